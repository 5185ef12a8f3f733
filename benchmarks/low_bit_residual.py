"""Measures whether low-rank residuals on top of low-bit matrices are worth their bytes; results/low_bit_residual.md.

    python -m benchmarks.low_bit_residual [--write] [--heldout-tokens 4096]

A matrix that stays factored could be written for llama.cpp as a low-bit matrix and an adapter of low rank. The question
is whether the adapter's bytes would not be spent better on more bits. All matrices of the blocks of the default model
are rounded to a type of GGUF files, as `export --format gguf --quantize` does. Where there is a residual, it is the
best of low rank in the metric of C and G of what rounding removed, in float16, with singular directions chosen over all
matrices by what they gain per byte, until the bytes are those of a type with more bits. Embedding and vectors stay
exact. The held-out text consists of two corpora; nothing is tuned on it.

The default model, as it comes by pip, was rounded to q4_1 before, so that this type would show no error.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

import gguf
import numpy as np
import torch

from benchmarks.model_quality import Bench
from benchmarks.report import Bar, markdown, publish
from compression import dense_weight
from compression.numerics.whitening import Whitening
from search.config import Config
from search.experiment.experiment import Experiment
from search.experiment.open_model import open_model

_TYPES = ("q4_0", "q5_0", "q8_0")
_BASES = (("q4_0", "q5_0"), ("q4_0", "q8_0"), ("q5_0", "q8_0"))
"""Type of the base, and the type with whose bytes base and residual are to compete."""


@dataclass(frozen=True)
class Residual:
    """What rounding removed from a matrix, as singular directions in the metric, largest first.

    Attributes:
        left, right: factors (out, n) and (n, in) with the metric taken out; their first r columns and rows give the
            best residual of rank r.
        gain: what each direction gains in predicted nats per token, (n,).
    """

    left: torch.Tensor
    right: torch.Tensor
    gain: torch.Tensor

    @property
    def bytes(self) -> int:
        """Bytes of one direction in float16."""
        return 2 * (self.left.shape[0] + self.right.shape[1])


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """A matrix as a GGUF file of this type holds it."""
    number = gguf.GGMLQuantizationType[kind.upper()]
    values = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), number), number)
    return torch.from_numpy(np.ascontiguousarray(values))


def bits(kind: str) -> float:
    """Bits of one entry, scales included."""
    entries, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    return 8 * size / entries


def residual(error: torch.Tensor, metric: Whitening) -> Residual:
    """The singular directions of an error in a metric."""
    left, values, right = torch.linalg.svd(metric.apply(error.double()), full_matrices=False)
    return Residual(
        metric.undo_left(left * values.sqrt()).float(),
        metric.undo_right(values.sqrt()[:, None] * right).float(),
        values**2,
    )


def ranks(residuals: Mapping[str, Residual], budget: float) -> dict[str, int]:
    """The rank of every residual when directions are taken by what they gain per byte, until the bytes are spent."""
    names = list(residuals)
    rate = torch.cat([each.gain / each.bytes for each in residuals.values()])
    owner = torch.cat([torch.full((len(each.gain),), n) for n, each in enumerate(residuals.values())])
    order = rate.argsort(descending=True)
    cost = torch.tensor([float(each.bytes) for each in residuals.values()])[owner[order]].cumsum(0)
    counts = torch.bincount(owner[order][cost <= budget], minlength=len(names))
    return dict(zip(names, counts.tolist(), strict=True))


@torch.no_grad()
def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--write", action="store_true", help="write the table to results/")
    parser.add_argument("--heldout-tokens", type=int, default=4096, help="held-out tokens (default: 4096)")
    given = parser.parse_args()
    device = torch.device("cpu")
    config = Config(heldout_tokens=given.heldout_tokens)
    loaded, sites = open_model(config, device)
    experiment = Experiment.of(config, loaded, sites, device)
    bench, statistics, model = Bench.of(experiment, []), experiment.calibration(), loaded.model
    weights = {site.name: dense_weight(model.get_submodule(site.name)) for site in sites}
    exact = {name: weight.clone() for name, weight in weights.items()}
    entries = sum(weight.numel() for weight in exact.values())
    metrics = {
        name: Whitening.of(statistics.input(name), statistics.gradient(name), config.shrinkage) for name in exact
    }
    rows: list[list[object]] = []
    found: dict[tuple[str, str], float] = {}

    def measure(base: str, beside: str, changed: Mapping[str, torch.Tensor], note: str) -> None:
        for name, values in changed.items():
            weights[name].copy_(values)
        kls = {corpus: workload.measure(model).kl for corpus, workload in bench.workloads.items()}
        rows.append(
            [base, beside or "none", f"{bits(beside or base):.1f}", note, *(f"{kl:.4f}" for kl in kls.values())]
        )
        found[base, beside] = float(np.mean(list(kls.values())))
        print(*rows[-1], flush=True)

    for kind in _TYPES:
        measure(kind, "", {name: rounded(weight, kind) for name, weight in exact.items()}, "-")
    for base, rival in _BASES:
        bases = {name: rounded(weight, base) for name, weight in exact.items()}
        residuals = {name: residual(exact[name] - bases[name], metrics[name]) for name in exact}
        chosen = ranks(residuals, (bits(rival) - bits(base)) / 8 * entries)
        changed = {
            name: bases[name] + (each.left[:, :rank].half().float() @ each.right[:rank].half().float())
            for (name, each), rank in zip(residuals.items(), chosen.values(), strict=True)
        }
        measure(base, rival, changed, f"{min(chosen.values())} to {max(chosen.values())}")
    held = ", ".join(f"{name} {work.tokens:,} tokens" for name, work in bench.workloads.items())
    body = (
        "KL(dense ‖ rounded) in nats per token of SmolLM2-135M-Instruct, whose matrices inside the blocks are rounded "
        'to a type of GGUF files; "residual to the bytes of" means a residual of low rank in float16, with which '
        f"the matrices have as many bytes as that type. Held-out text: {held}.\n\n"
        + markdown(["type", "residual to the bytes of", "bits an entry", "ranks", *bench.workloads], rows)
    )
    bars = [
        Bar(
            f"{base} with a residual over {rival}, mean of both corpora",
            found[base, rival] / found[rival, ""],
            "<=",
            1.0,
        )
        for base, rival in _BASES
    ]
    publish("benchmarks.low_bit_residual", "Low-rank residuals on low-bit matrices", body, bars, given.write)


if __name__ == "__main__":
    main()
