"""Makes a plain model whose rounded matrices are stored as an engine reads them, and says so in its settings.

Two layouts hold any matrix of 2, 3, 4, 5, 6 or 8 bits exactly, since both are the stream of bits of
`compression.numerics.group_integers.Codes`, in words of 32 bits: "pack-quantized" of the package compressed-tensors,
which vLLM and transformers read, and that of MLX. A value is (code − 2^(bits−1)) · scale in the one, and code · scale +
bias, whose bias is −2^(bits−1) · scale, in the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from compression.layers.packed import PackedEmbedding, PackedLinear, PackedMatrix
from compression.numerics.group_integers import dequantize
from compression.numerics.packed_size import FLOATING
from compression.refusal import Refusal
from search.engines import ENGINES, INTEGERS
from search.export.deci import check_deci
from search.export.plain import plain_model

__all__ = ["check_integers", "integer_model", "rounded_matrices", "stands_for"]

_WORD = 4  # bytes
_PIECE = 1 << 22  # entries that are compared at once
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Matrices that vLLM computes as one."""
_ENGINE = {each.rounded: (name, each) for name, each in ENGINES.items() if each.rounded in INTEGERS}


class _Stored(nn.Module):
    """Holds the tensors of a matrix as a file has them; it computes nothing."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None) -> None:
        super().__init__()
        for name, values in tensors.items():
            self.register_buffer(name, values)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))


def check_integers(model: Any, kind: str) -> None:
    """Refuse a model whose matrices cannot be rounded in a format; looks at no weights.

    Args:
        kind: one of `INTEGERS`.

    Raises:
        Refusal: the architecture is none whose blocks may have different widths.
    """
    check_deci(model, f"rounded matrices in the format {kind}")


@torch.no_grad()
def integer_model(model: Any, kind: str) -> tuple[Any, dict[str, object]]:
    """Return a plain model with the integers of a rounded one, and what its config.json says of them.

    Args:
        model: a model of plain and rounded matrices in float16; it does not change.
        kind: one of `INTEGERS`.

    Raises:
        Refusal: names a matrix that the format or its engine cannot hold.
    """
    packed = {name: each for name, each in model.named_modules() if isinstance(each, PackedLinear | PackedEmbedding)}
    stored = rounded_matrices(model)
    if not stored:
        raise Refusal(f"the {kind} format is for rounded matrices, and none is; use --format plain")
    _refuse(kind, stored)
    for name, module in packed.items():
        model.set_submodule(name, _without_values(module))
    try:
        small = plain_model(model, whole=True)
    finally:
        for name, module in packed.items():
            model.set_submodule(name, module)
    for name, module in packed.items():
        tensors = _LAYOUT[kind](stored[name]) if name in stored else {}
        small.set_submodule(name, _Stored(tensors, getattr(module, "bias", None)))
    return small, _SETTINGS[kind](stored, [name for name, each in small.named_modules() if isinstance(each, nn.Linear)])


def _matrix(module: PackedLinear | PackedEmbedding) -> PackedMatrix:
    return module.stored if isinstance(module, PackedLinear) else module.packed


def rounded_matrices(model: Any) -> dict[str, PackedMatrix]:
    """The rounded matrices of a model by the name of their module; one that an embedding shares is named once."""
    packed = {name: each for name, each in model.named_modules() if isinstance(each, PackedLinear | PackedEmbedding)}
    return {name: _matrix(module) for name, module in packed.items() if not _tied(module)}


def stands_for(kind: str, tensors: Mapping[str, torch.Tensor], matrix: PackedMatrix) -> bool:
    """Whether the stored tensors are a matrix, by the rule of the engine that reads them.

    Each entry is found by itself, unlike in `compression.numerics.group_integers`.

    Args:
        tensors: those of the module in the file, by the last part of their names.
    """
    words = tensors["weight_packed" if kind == "compressed-tensors" else "weight"].view(torch.int32)
    first = torch.arange(matrix.columns) * matrix.bits
    at, shift = first // 32, first % 32
    following = (at + 1).clamp_max(words.shape[1] - 1)
    step = max(1, _PIECE // matrix.columns)
    for rows in (slice(start, start + step) for start in range(0, len(words), step)):
        each = words[rows].long() & 0xFFFFFFFF
        codes = ((each[:, at] | each[:, following] << 32) >> shift & ((1 << matrix.bits) - 1)).float()
        if kind == "compressed-tensors":
            found = (codes - (1 << (matrix.bits - 1))) * _spread(tensors["weight_scale"][rows], matrix)
        else:
            found = codes * _spread(tensors["scales"][rows], matrix) + _spread(tensors["biases"][rows], matrix)
        if not torch.equal(found, _values(matrix, rows)):
            return False
    return True


def _values(matrix: PackedMatrix, rows: slice) -> torch.Tensor:
    scales = matrix.scales[rows].view(torch.float16).float()
    return dequantize(matrix.codes[rows], scales, matrix.columns, matrix.bits, matrix.group).cpu()


def _spread(values: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    return values.float().repeat_interleave(matrix.group, 1)


def _tied(module: nn.Module) -> bool:
    return isinstance(module, PackedLinear) and bool(module.tied)


def _without_values(module: PackedLinear | PackedEmbedding) -> nn.Module:
    """An ordinary module of the same shape, whose weight has no values."""
    matrix = _matrix(module)
    rows, dtype = len(matrix.codes), matrix.like.dtype
    if isinstance(module, PackedEmbedding):
        return nn.Embedding(rows, matrix.columns, device="meta", dtype=dtype)
    made = nn.Linear(matrix.columns, rows, bias=False, device="meta", dtype=dtype)
    made.register_parameter("bias", module._parameters["bias"])
    return made


def _refuse(kind: str, matrices: Mapping[str, PackedMatrix]) -> None:
    """Refuse matrices that a format or its engine cannot hold."""
    engine, held = _ENGINE[kind]
    again = f"search with --serve {engine}, or export with --format hf"
    for name, matrix in matrices.items():
        if matrix.bits not in held.bits or matrix.group != held.group or matrix.columns % held.group:
            bits = ", ".join(map(str, held.bits[1:-1])) + f" or {held.bits[-1]}"
            raise Refusal(
                f"{name} has {matrix.columns} columns in {matrix.bits} bits and groups of {matrix.group}, and {engine} "
                f"takes {bits} bits in groups of {held.group} that fill the columns; {again}"
            )
        if not torch.isfinite(matrix.scales.view(torch.float16).float() * (1 << (matrix.bits - 1))).all():
            raise Refusal(f"{name} has scales that are too large for float16; export with --format hf")
    if not held.fused:
        return
    for name in matrices:
        owner, _, leaf = name.rpartition(".")
        together = [f"{owner}.{part}" for part in next((each for each in _FUSED if leaf in each), ())]
        found = {each.rpartition(".")[2]: matrices[each].bits if each in matrices else FLOATING for each in together}
        if len({*found.values()}) > 1:
            has = ", ".join(f"{part} {number}" for part, number in found.items())
            raise Refusal(
                f"{engine} needs the same bits in matrices that read the same, and {owner} has {has}; {again}"
            )


def _words(matrix: PackedMatrix) -> torch.Tensor:
    """The codes as words, int32 (rows, words)."""
    space = -matrix.codes.shape[1] % _WORD
    return functional.pad(matrix.codes.cpu(), (0, space)).contiguous().view(torch.int32)


def _scales(matrix: PackedMatrix) -> torch.Tensor:
    return matrix.scales.view(torch.float16).cpu().clone()


def _compressed_tensors(matrix: PackedMatrix) -> dict[str, torch.Tensor]:
    shape = torch.tensor([len(matrix.codes), matrix.columns])
    return {"weight_packed": _words(matrix), "weight_scale": _scales(matrix), "weight_shape": shape}


def _mlx(matrix: PackedMatrix) -> dict[str, torch.Tensor]:
    scales = _scales(matrix)
    return {
        "weight": _words(matrix).view(torch.uint32),
        "scales": scales,
        "biases": scales * -(1 << (matrix.bits - 1)),  # exact, as a power of two
    }


def _compressed_tensors_settings(stored: Mapping[str, PackedMatrix], others: list[str]) -> dict[str, object]:
    """What the package compressed-tensors reads: a group of modules for every number of bits."""
    by_form = defaultdict(list)
    for name, matrix in stored.items():
        by_form[matrix.bits, matrix.group].append(name)
    groups = {}
    for number, ((bits, group), names) in enumerate(sorted(by_form.items())):
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
        groups[f"group_{number}"] = {
            "targets": names,
            "weights": {**weights, "dynamic": False, "observer": None},
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": others,
        }
    }


def _mlx_settings(stored: Mapping[str, PackedMatrix], others: list[str]) -> dict[str, object]:
    """What mlx-lm reads: the usual group and bits, and those of every module; false for one that is not rounded."""
    each: dict[str, object] = {name: {"group_size": it.group, "bits": it.bits} for name, it in stored.items()}
    usual = next(iter(stored.values()))
    return {
        "quantization": {"group_size": usual.group, "bits": usual.bits, **each, **dict.fromkeys(others, False)},
    }


_LAYOUT = {"compressed-tensors": _compressed_tensors, "mlx": _mlx}
_SETTINGS = {"compressed-tensors": _compressed_tensors_settings, "mlx": _mlx_settings}
