"""Measures memory and speed of the KV cache at long context, and the KL to the dense model by position.

    python -m benchmarks.kv_cache [--quick] [--write] [--contexts 4096 8192] [--kept 0.618] [--texts 2]

Compares three sides, which take turns: the default model, dense with a plain cache; the same model at the closed-form
allocation with a plain cache; and the latter with a cache of latents (`search.model.latent_cache`), which keeps χ
numbers of k and v instead of all their outputs. Speed is measured for a prefill of the whole context and for the
decoding steps after it. The KL by position comes from one pass over held-out encyclopedia text without a cache. The
kind of cache should not change the logits; the table shows their largest difference over the decoding steps.
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
_PIECE = 512  # positions whose logits are held in memory at once
_RUN = 64  # positions averaged for one sample of the standard error


@dataclass
class Side:
    """A model with one kind of cache, and its measurements at one context length.

    Attributes:
        name: name in the table.
        model: the model.
        latent: whether the cache holds latents.
        bytes: bytes of the cache after the prefill.
        prefill: seconds of every prefill.
        step: seconds of every decoding step.
        logits: logits of the last decoding steps, (1, steps, vocabulary).
    """

    name: str
    model: Any
    latent: bool
    bytes: int = 0
    prefill: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    logits: torch.Tensor | None = None

    @torch.no_grad()
    def measure(self, ids: torch.Tensor) -> None:
        """Runs a prefill of the context and then the decoding steps over `ids`, (1, context + steps)."""
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
    """KL(dense‖model) in nats at every position of `ids`, (1, positions) -> (positions,)."""
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
    """Mean KL and its standard error by ranges of positions that double in length; `kl` is (texts, positions).

    Neighbouring positions are not independent, so the standard error is taken over means of runs of 64 positions.
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
    """Returns `count` pieces of held-out encyclopedia text, (1, length) each.

    Raises:
        ValueError: the held-out text is shorter than `count` · `length` tokens.
    """
    heldout = regions(load_prose()[CORPORA["encyclopedia"]])[2]
    loaded = experiment.loaded
    stream = [token for text in heldout for token in loaded.encode(text + "\n\n")]
    room = length - len(loaded.beginning)
    if len(stream) < room * count:
        raise Refusal(
            f"the texts must fit into {len(stream)} held-out tokens, got {room * count}; "
            "use fewer --texts or shorter --contexts"
        )
    pieces = (stream[room * each : room * (each + 1)] for each in range(count))
    return [torch.tensor([[*loaded.beginning, *piece]]).to(experiment.device) for piece in pieces]


def main() -> None:
    """Measures and prints, and writes the report if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="use one short context")
    parser.add_argument("--write", action="store_true", help="write the tables to results/")
    parser.add_argument("--contexts", type=int, nargs="+", help="context lengths in tokens (default: 4096 8192)")
    parser.add_argument("--kept", type=float, default=0.618, help="kept fraction over the sites (default: 0.618)")
    parser.add_argument("--texts", type=int, help="texts of the longest context for the KL (default: 2; quick: 1)")
    given = parser.parse_args()
    contexts: Sequence[int] = given.contexts or ([512] if given.quick else [4096, 8192])
    config = Config(target_kept=given.kept)
    experiment = Experiment.open(config)
    model = experiment.loaded.model
    menu = experiment.menu()
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
        f"SmolLM2-135M-Instruct in {dtype} at kept fraction {given.kept} over the sites by the closed form, neither "
        f"repaired nor healed. The KL is measured on {len(texts)} texts of {max(contexts):,} tokens. Speeds are "
        "medians."
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
