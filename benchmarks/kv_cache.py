"""The KV cache at long context: memory, speed, and how the KL to the dense model grows with position.

    python -m benchmarks.kv_cache [--quick] [--write] [--contexts 4096 8192] [--kept 0.618] [--texts 2]

The default model, dense with a plain cache, and at the closed-form allocation with a plain one and with one of latents
(`search.model.latent_cache`), which keeps χ numbers of k and v instead of all their outputs. Speed is that of a
prefill of the whole context and of the steps after it; the sides take turns. The KL is that of one pass over held-out
encyclopedia text, by position; which cache a pass uses does not change it, and by how much the logits of the steps
differ is shown.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax

from benchmarks.healing import CORPORA
from benchmarks.report import markdown, publish
from compression import ScheduleApplier, lagrangian, to_schedule
from compression.refusal import Refusal
from search.config import Config
from search.data.prose import load_prose, regions
from search.experiment.experiment import Experiment
from search.healing.sharding import sharing_copy
from search.model.latent_cache import cache_bytes, latent_cache, plain_cache

_STEPS, _ROUNDS = 8, 3
_PIECE = 512  # positions whose logits are there at once
_RUN = 64  # positions


@dataclass
class Side:
    """A model with one kind of cache, and what was measured of it at one context."""

    name: str
    model: Any
    latent: bool
    bytes: int = 0
    prefill: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    logits: torch.Tensor | None = None

    @torch.no_grad()
    def measure(self, ids: torch.Tensor) -> None:
        """A prefill with all of `ids` (1, context + steps) but the steps, and the steps."""
        context = ids.shape[1] - _STEPS
        with latent_cache(self.model) if self.latent else nullcontext(plain_cache(self.model)) as cache:
            start = time.perf_counter()
            self.model(input_ids=ids[:, :context], past_key_values=cache, logits_to_keep=1)
            self.prefill.append(time.perf_counter() - start)
            self.bytes = cache_bytes(cache)
            logits = []
            for place in range(context, ids.shape[1]):
                start = time.perf_counter()
                logits.append(self.model(input_ids=ids[:, place : place + 1], past_key_values=cache).logits)
                self.step.append(time.perf_counter() - start)
        self.logits = torch.cat(logits, 1).float()


@torch.no_grad()
def divergences(dense: Any, model: Any, ids: torch.Tensor) -> torch.Tensor:
    """KL(dense‖model), nats, at every position of `ids` (1, positions)."""
    hidden = [each.base_model(input_ids=ids, use_cache=False).last_hidden_state[0] for each in (dense, model)]
    found = []
    for start in range(0, ids.shape[1], _PIECE):
        logs = [
            log_softmax(each.get_output_embeddings()(states[start : start + _PIECE]).float(), -1)
            for each, states in zip((dense, model), hidden, strict=True)
        ]
        found.append(kl_div(logs[1], logs[0], reduction="none", log_target=True).sum(-1))
    return torch.cat(found)


def by_position(kl: torch.Tensor) -> list[list[object]]:
    """Mean and standard error over texts and positions, from one power of two to the next; `kl` is (texts, positions).

    Neighbouring positions are not independent, so the error is that of means over runs of 64.
    """
    rows: list[list[object]] = []
    start, stop = 0, 4 * _RUN
    while start + _RUN <= kl.shape[1]:
        runs = kl[:, start:stop].unfold(1, _RUN, _RUN).mean(-1).flatten()
        error = float(runs.std()) / math.sqrt(len(runs))
        last = min(stop, kl.shape[1]) - 1
        rows.append([f"{start} to {last}", len(runs) * _RUN, f"{float(runs.mean()):.3f} ± {error:.3f}"])
        start, stop = stop, 2 * stop
    return rows


def _texts(experiment: Experiment, length: int, count: int) -> list[torch.Tensor]:
    """Held-out encyclopedia text, `count` pieces (1, length).

    Raises:
        ValueError: there is not so much.
    """
    heldout = regions(load_prose()[CORPORA["encyclopedia"]])[2]
    stream = [token for text in heldout for token in experiment.loaded.encode(text + "\n\n")]
    if len(stream) < length * count:
        raise Refusal(f"there are {len(stream)} held-out tokens, and {length * count} are asked for")
    return [
        torch.tensor(stream[length * each : length * (each + 1)])[None].to(experiment.device) for each in range(count)
    ]


def main() -> None:
    """Measure, print, and write when told."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one short context")
    parser.add_argument("--write", action="store_true", help="keep the table in results/")
    parser.add_argument("--contexts", type=int, nargs="+")
    parser.add_argument("--kept", type=float, default=0.618)
    parser.add_argument("--texts", type=int, help="of the longest context")
    given = parser.parse_args()
    contexts: Sequence[int] = given.contexts or ([512] if given.quick else [4096, 8192])
    config = Config(target_kept=given.kept)
    experiment = Experiment.open(config)
    model = experiment.loaded.model
    menu = experiment.store.menu()
    schedule = to_schedule(menu, lagrangian(menu, math.floor(given.kept * menu.dense_parameters)))
    texts = _texts(experiment, max(contexts) + _STEPS, given.texts or (1 if given.quick else 2))
    dense = sharing_copy(model)
    parts = []
    with ScheduleApplier(model, experiment.store, packed=True) as applier:
        applier.apply_(schedule)
        rows: list[list[object]] = []
        for context in contexts:
            sides = [
                Side("dense", dense, False),
                Side("compressed", model, False),
                Side("compressed, latents", model, True),
            ]
            for _ in range(1 if given.quick else _ROUNDS):
                for side in sides:
                    side.measure(texts[0][:, : context + _STEPS])
            rows += [_row(side, sides, context) for side in sides]
        header = ["side", "context", "cache bytes a token", "of dense", "prefill tok/s", "decode tok/s", "of dense"]
        parts.append(markdown([*header, "logits from plain, at most"], rows))
        kl = torch.stack([divergences(dense, model, ids) for ids in texts])
        parts.append(markdown(["position", "places", "KL, nats per token"], by_position(kl)))
    dtype = str(model.dtype).removeprefix("torch.")
    intro = (
        f"SmolLM2-135M-Instruct, {dtype}, at kept {given.kept} over the sites by the closed form, neither repaired nor "
        f"healed. {len(texts)} texts of {max(contexts):,} tokens; speeds are medians."
    )
    publish("benchmarks.kv_cache", "The KV cache at long context", "\n\n".join([intro, *parts]), [], given.write)


def _row(side: Side, sides: Sequence[Side], context: int) -> list[object]:
    dense, plain = sides[:2]
    assert side.logits is not None
    assert plain.logits is not None
    away = f"{float((side.logits - plain.logits).abs().max()):.4f}" if side.latent else "-"
    return [
        side.name,
        f"{context:,}",
        f"{side.bytes / context:,.0f}",
        f"{side.bytes / dense.bytes:.2f}",
        f"{context / median(side.prefill):,.0f}",
        f"{1 / median(side.step):,.1f}",
        f"{median(dense.step) / median(side.step):.2f}",
        away,
    ]


if __name__ == "__main__":
    main()
