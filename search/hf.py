"""Extends transformers: after `import search.hf`, `from_pretrained` and `save_pretrained` handle compressed folders.

A compressed folder is an ordinary model folder whose config.json lists, in `quantization_config`, the compressed
modules that replace dense ones (see `compression.layers.skeleton`). The architecture and `model_type` do not change.

In a process without this plug-in, transformers does not know the method and would fill the missing dense weights with
random numbers. To prevent that, the folder stores, for every compressed matrix, a tensor of another shape under the
name of the dense weight, on which such a process raises: an empty one, or the matrix itself if it is a plain one that
lost rows or columns. Experts that were taken apart have empty ones under the names of their fused tensors. Which rows
and columns are left is stored beside it (see `compression.layers.kept`). This also protects the folders that
`save_pretrained` and Trainer write, and needs no special file name. Tensors have the names of the modules, whatever
names the architecture has in files of its own. The header of each weight file holds the sha256 of every tensor, the
values of config.json and the descriptions of the compressed modules. All of that is verified before any tensor is used,
so that a config with another epsilon or activation is refused too.

A copy of this module and of the parts of `compression` that it uses is exported beside the weights as one file: see
`search.export.standalone`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compression.layers.kept import check_kept, kept
from compression.layers.merge import merge_
from compression.layers.mpo_linear import MPOLinear
from compression.layers.packed import PackedLinear, PackedMPO
from compression.layers.skeleton import check_places, describe, put_skeleton_
from compression.layers.sparse_linear import SparseLinear
from compression.refusal import Refusal

__all__ = ["FORMAT", "METHOD", "ChiselConfig", "ChiselQuantizer", "lora_layers", "register", "verify_folder"]

METHOD, FORMAT = "chisel", 4
"""Name of the quantization method in config.json, and number of the newest format that this code reads.

Format 1 has no matrices that lost rows or columns, format 2 no pruned ones, and format 3 none of 2, 3, 5 or 6 bits and
no pruned ones of integers; otherwise they are the same.
"""

_CHECKSUMS = "chisel_sha256"  # key in the header of a weight file; its value is JSON: tensor name to checksum
_CONFIG = "chisel_config"  # likewise; the values of the config and the descriptions of the modules
_MODULES = "quantization_config.modules"
_FREE = (
    *("_name_or_path", "architectures", "auto_map", "dtype", "quantization_config", "torch_dtype"),
    *("transformers_version", "use_cache"),
)
"""Fields of a config that may differ from those in the header: they do not change what the model computes."""


class ChiselConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a compressed model in config.json.

    Args:
        modules: description of the compressed modules, see `compression.layers.skeleton.describe`.
        format: format number of the folder, at least 1.

    Raises:
        ValueError: this code does not know the format, or `modules` is not a mapping.
    """

    def __init__(self, modules: Mapping[str, Any] | None = None, format: int = FORMAT, **other: Any) -> None:
        if type(format) is not int or not 1 <= format <= FORMAT:
            raise Refusal(
                f"this model has format {format!r:.80}, and this code reads formats 1 to {FORMAT}; get a newer Chisel"
            )
        if not isinstance(modules, Mapping):
            raise Refusal(f"quantization_config.modules must be a mapping of compressed modules, got {modules!r:.80}")
        self.quant_method = METHOD
        self.format = format
        self.modules = dict(modules)


class ChiselQuantizer(HfQuantizer):  # type: ignore[misc]
    """Inserts the compressed modules before the weights are loaded, and verifies the weight files."""

    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def is_serializable(self) -> bool:
        """Return whether `save_pretrained` works; it does."""
        return True

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        modules = self.quantization_config.modules
        if not checkpoint_files:
            raise Refusal("a compressed model is loaded from safetensors files, and none were given")
        _verify_config(checkpoint_files, type(model.config), modules)
        self._shapes = put_skeleton_(model, modules)
        placeholders = _placeholders(modules)
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        model.all_tied_weights_keys = {name: other for name, other in tied.items() if name not in placeholders}
        _verify(checkpoint_files, _expected(model), placeholders)
        patterns = {rf"^{re.escape(name)}$" for name in placeholders}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *patterns}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, shape in self._shapes.items():
            module = model.get_submodule(name)
            try:
                check_kept(kept(module), shape)
                if isinstance(module, MPOLinear | PackedMPO):
                    check_places(module, dict(module.named_buffers()))
                if isinstance(module, SparseLinear):
                    module.check()
            except ValueError as error:
                raise Refusal(f"compressed module {name}: {error}") from None
        # transformers refuses these two for whatever has a quantizer, though nothing here needs one dtype
        model.half, model.float = partial(model.to, torch.float16), partial(model.to, torch.float32)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Return no conversions: tensors are stored under the names and in the shapes that they have in the model.

        For many architectures transformers otherwise renames, splits or merges tensors when it saves and loads, which
        it can do for dense weights only. Early versions of transformers 5 do not pass the model.
        """
        return []

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Return the tensors and the file header that `save_pretrained` writes; updates the module description."""
        self.quantization_config.modules = describe(model)
        model._weight_conversions = []  # saved as in `update_weight_conversions`, wherever the model came from
        if not model.is_remote_code():
            vars(model.config).pop("auto_map", None)  # no code is written beside the weights
        state = dict(model.state_dict())
        self.quantization_config.format = FORMAT
        state |= dict.fromkeys(_placeholders(self.quantization_config.modules), torch.empty(0))
        checksums = {name: _checksum(name, values) for name, values in state.items()}
        values = _config_values(model.config, self.quantization_config.modules)
        return state, {_CHECKSUMS: json.dumps(checksums), _CONFIG: json.dumps(values)}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        config = type(model.config).from_dict({**model.config.to_dict(), "quantization_config": None})
        with torch.device("meta"):
            merge_(model, type(model)(config))
        return model


def register(replace: bool = True) -> None:
    """Register the method with transformers in this process; without `replace`, only if it is not registered yet."""
    if replace or METHOD not in AUTO_QUANTIZER_MAPPING:
        AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = ChiselConfig
        AUTO_QUANTIZER_MAPPING[METHOD] = ChiselQuantizer


def lora_layers() -> dict[type, type]:
    """Return the LoRA layer class for each compressed layer class, for `LoraConfig(…)._register_custom_module(…)`.

    Merging an adapter would change bond dimensions and masks, so it raises; save the adapter separately.

    Raises:
        ImportError: PEFT is not installed.
    """
    try:
        from peft.tuners.lora import Linear as LoraLinear
    except ImportError as error:
        raise ImportError("LoRA on a compressed model needs PEFT: pip install peft") from error

    class ChiselLora(LoraLinear):
        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            raise Refusal("an adapter cannot be merged into what a compressed layer stores; keep it beside them")

    return dict.fromkeys((MPOLinear, PackedMPO, PackedLinear, SparseLinear), ChiselLora)


def _placeholders(modules: Mapping[str, Any]) -> set[str]:
    """Return the names of the empty tensors; a plain matrix that lost rows or columns has its own weight instead."""
    return {
        f"{name}.{tensor}"
        for name, each in modules.items()
        if each["kind"] != "linear"
        for tensor in each.get("tensors", ("weight",))
    }


def _expected(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that the files must hold; tied tensors are stored under one name only."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: tuple(values.shape) for name, values in model.state_dict().items() if name not in tied}


def verify_folder(folder: Path) -> None:
    """Refuse a compressed folder whose config or weights have changed since they were written; loads no model.

    Raises:
        ValueError: names what differs.
    """
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    files = [str(file) for file in sorted(folder.glob("*.safetensors"))]
    modules = getattr(config, "quantization_config", {}).get("modules", {})
    _verify_config(files, type(config), modules)
    for file in files:
        for _ in _tensors(file):
            pass


def _verify(files: Sequence[str], expected: Mapping[str, tuple[int, ...]], placeholders: set[str]) -> None:
    """Refuse weight files whose tensors are not exactly the expected ones, or have changed since they were written.

    Raises:
        ValueError: a tensor is missing, unexpected or damaged; the message names the file or the tensor.
    """
    missing = set(expected)
    for file in files:
        for name, values in _tensors(file):
            if name not in placeholders and tuple(values.shape) != expected.get(name):
                wanted = expected.get(name, "no such tensor")
                raise Refusal(f"{file}: {name} has shape {tuple(values.shape)}, the model needs {wanted}")
            missing.discard(name)
    if missing:
        raise Refusal(f"the weight files lack {len(missing)} tensors, such as {min(missing)}")


def _tensors(file: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a weight file by name; each is compared with its checksum when the caller goes on.

    Raises:
        ValueError: the file is no safetensors, or a tensor is damaged.
    """
    if not str(file).endswith(".safetensors"):
        raise Refusal(f"{file} is not safetensors; pickle files can run code when read and are never opened")
    try:
        with safe_open(file, "pt") as tensors:
            checksums = json.loads((tensors.metadata() or {})[_CHECKSUMS])
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                values = tensors.get_tensor(name)
                yield name, values
                if checksums.get(name) != _checksum(name, values):
                    raise Refusal(f"{file}: {name} is damaged, its checksum differs")
    except (SafetensorError, KeyError, AttributeError, RecursionError, json.JSONDecodeError) as error:
        raise Refusal(f"{file} is truncated, damaged or without checksums: {error}") from error


def _config_values(config: Any, modules: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config says about the computation, with all defaults filled in, as plain JSON values."""
    values = {name: value for name, value in config.to_dict().items() if name not in _FREE}
    plain: dict[str, Any] = json.loads(json.dumps({**values, _MODULES: modules}, default=str))
    return plain


def _verify_config(files: Sequence[str], kind: type[Any], modules: Mapping[str, Any]) -> None:
    """Refuse a config.json that differs from what the weight files beside it were written with.

    The file is compared, not the config of the model, which the caller may have changed on purpose. Fields that only
    this version of transformers knows or does not know any more are not compared. Files of earlier versions of this
    format hold no config, which is accepted.

    Raises:
        ValueError: names the field, its value, and the one it had.
    """
    for file in files:
        place = Path(file).with_name("config.json")
        if not str(file).endswith(".safetensors") or not place.is_file():
            continue
        try:
            with safe_open(file, "pt") as tensors:
                text = (tensors.metadata() or {}).get(_CONFIG)
            if text is None:
                continue
            written = json.loads(text)
            raw = {name: value for name, value in json.loads(place.read_text("utf-8")).items() if name not in _FREE}
            decoded, _ = kind.get_config_dict(place.parent, local_files_only=True)  # JSON has no infinity of its own
            now = _config_values(kind.from_dict({name: decoded[name] for name in raw}), modules)
        except (SafetensorError, OSError, ValueError, AttributeError) as error:
            raise Refusal(f"{file} or its config.json is damaged: {error}") from error
        if difference := _difference("", written, now, {**raw, _MODULES: modules}):
            raise Refusal(f"{place} was changed after the weights were written: {difference}; undo that")


def _difference(name: str, before: Any, now: Any, raw: Any) -> str:
    """Return the first difference between two values as words, or an empty text.

    Args:
        raw: what the file holds of the value; an entry that was not written is a difference.
    """
    if name == _MODULES and before != now:
        changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        return f"the description of {changed[0]} in {name} differs"
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return "" if before == now else f"{name} was {json.dumps(before):.60}, is {json.dumps(now):.60}"
    inner = raw if isinstance(raw, Mapping) else {}
    prefix = f"{name}." if name else ""
    if added := sorted(inner.keys() - before.keys()):
        return f"{prefix}{added[0]} was added"
    for key in sorted(before.keys() & now.keys()):
        if difference := _difference(f"{prefix}{key}", before[key], now[key], inner.get(key)):
            return difference
    return ""


def _checksum(name: str, values: torch.Tensor) -> str:
    """Return the sha256 over the name, dtype, shape and bytes of a tensor, in hex."""
    digest = hashlib.sha256(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
    digest.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


register()
