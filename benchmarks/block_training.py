"""Compares training a repaired model block by block with healing it whole, in the same time.

    python -m benchmarks.block_training [--quick] [--write] [--prior FILE] [--tokens 32768] [--epochs 3]

The default model is compressed by a schedule and repaired. Block by block, what is left of the matrices, the cores and
the norms are then trained to give the outputs of the dense model from the inputs that the compressed one produces, by
Adam, with the squared distance in the metric of the gradient at the output of the block, ½ (ŷ − y)ᵀ G (ŷ − y). With
look-ahead, the distance is that after the next dense block, in its metric. Healing starts from the same repaired model
and trains for as long as the first way took. All are judged on search and selection text, which none learns from.

Block by block is how a model is trained that does not fit into memory (AA-SVD and others find it to be the larger part
of their gain); a model that fits can be healed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.report import markdown, publish
from compression.calibration.blocks import Block, record_blocks
from compression.numerics.whitening import shrink
from compression.sites import find_blocks
from compression.training.trainable import frozen, put_parameters, trainable_
from search.config import Config
from search.evaluation.workload import Workload
from search.experiment.experiment import Experiment
from search.healing.plan import HealingPlan
from search.healing.repaired_start import referenced, started_
from search.healing.rows import HealingText
from search.healing.run import judge_of
from search.healing.sharding import sharing_copy
from search.healing.text import heal_text
from search.healing.training import heal_
from search.priors.format import Prior
from search.runtime.console import Console

PRIOR = Path(__file__).resolve().parents[1] / "results" / "priors" / "smollm2-135m-instruct-94m.json"
_ROW, _ROWS = 256, 4
"""Tokens of a row, and rows of a step."""
_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Way:
    """One way of training blocks.

    Attributes:
        rate: peak learning rate of matrices; norms take three times as much.
        ahead: number of dense blocks after the trained one that the distance is measured behind.
    """

    rate: float
    ahead: int = 0


WAYS = (Way(1e-4), Way(3e-4), Way(1e-3), Way(3e-4, 1))


def train_blocks_(
    model: nn.Module,
    blocks: Sequence[Block],
    dense_blocks: Sequence[Block],
    states: Sequence[torch.Tensor],
    roots: Sequence[torch.Tensor],
    way: Way,
    epochs: int,
    arithmetic: AbstractContextManager[Any],
) -> None:
    """Train the parameters of `model` that require gradients, one block after the other, in place.

    Args:
        blocks, dense_blocks: the blocks of the compressed and of the dense model, recorded on the same batches.
        states: hidden states before the first block, by batch.
        roots: R (width, width) with R Rᵀ = G, by block.
        arithmetic: the context of all passes.
    """
    dense_states, last = list(states), len(blocks) - 1
    for number, block in enumerate(blocks):
        behind = min(number + way.ahead, last)
        through, root = dense_blocks[number + 1 : behind + 1], roots[behind]
        with torch.no_grad(), arithmetic:
            dense_states = dense_blocks[number].run(dense_states)
            targets = list(dense_states)
            for further in through:
                targets = further.run(targets)
        owned = [p for p in model.get_submodule(block.name).parameters() if p.requires_grad]
        matrices, vectors = ([p for p in owned if (p.ndim > 1) is wide] for wide in (True, False))
        groups = [{"params": group} for group in (matrices, vectors) if group]
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=_BETAS, weight_decay=0.0, fused=True)
        for done, batch in _order(len(states), epochs):
            with arithmetic:
                found = block.forward(batch, states[batch])
                for further in through:
                    found = further.forward(batch, found)
            distance = 0.5 * ((found.float() - targets[batch].float()) @ root).square().sum(-1).mean()
            torch.autograd.backward(distance)
            for group in optimizer.param_groups:
                peak = way.rate * (1 if group["params"][0].ndim > 1 else 3)
                group["lr"] = peak * min(1.0, (done + 0.01) / 0.1) * (1 - done)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad(), arithmetic:
            states = block.run(states)


def _order(batches: int, epochs: int) -> Iterator[tuple[float, int]]:
    """Yields the share of the steps that are done, and the batch of the next one."""
    generator = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        for place, batch in enumerate(torch.randperm(batches, generator=generator).tolist()):
            yield (epoch * batches + place) / (epochs * batches), batch


def _roots(experiment: Experiment, blocks: int) -> list[torch.Tensor]:
    """The roots of the gradient moments at the outputs of the blocks, where their last matrix writes."""
    statistics, roots = experiment.calibration(), []
    for number in range(blocks):
        last = [site.name for site in experiment.sites if site.block == number][-1]
        moment = shrink(statistics.gradient(last), experiment.config.shrinkage)
        roots.append(torch.linalg.cholesky(moment).float())
    return roots


def _batches(text: HealingText) -> list[tuple[torch.Tensor, torch.Tensor]]:
    pieces = torch.split(text.tokens.long(), _ROWS)
    return [(ids, torch.ones(ids.shape, dtype=torch.bool)) for ids in pieces]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="2,048 tokens once, and one way")
    parser.add_argument("--write", action="store_true", help="write the table to results/")
    parser.add_argument("--prior", type=Path, default=PRIOR, help="prior with the schedule (default: 94 M parameters)")
    parser.add_argument("--tokens", type=int, default=32_768, help="tokens that blocks are trained on")
    parser.add_argument("--epochs", type=int, default=3, help="times that every block sees them")
    arguments = parser.parse_args()
    tokens, epochs = (2048, 1) if arguments.quick else (arguments.tokens, arguments.epochs)
    ways = WAYS[: 1 if arguments.quick else None]
    prior = Prior.read(arguments.prior)
    experiment = Experiment.open(Config.of({"target_kept": round(prior.kept_fraction, 3)}))
    model: Any = experiment.loaded.model
    dense = sharing_copy(model)
    with Console() as console:
        started_(experiment, prior.schedule, dense, None, console)
        reduced = next(dense.parameters()).dtype
        arithmetic = torch.autocast(experiment.device.type, torch.bfloat16, enabled=reduced == torch.bfloat16)
        judges = {"search": judge_of(experiment, dense)}
        judges["selection"] = referenced(Workload(experiment.shards("selection")[0], dense), dense)
        rows: list[list[object]] = []

        def judged(name: str, seconds: float) -> None:
            found = {text: judge.measure(model) for text, judge in judges.items()}
            figures = [f"{each.kl:.4f}" for each in found.values()]
            rows.append([name, f"{seconds:.0f}", *figures, f"{found['search'].perplexity:.2f}"])
            print(rows[-1], flush=True)

        judged("repaired", 0.0)
        text = heal_text(experiment.loaded, "text", _ROW, 0, tokens)
        begun = frozen(model, trainable_(model))
        put_parameters(model, begun)
        name, _ = find_blocks(model)
        names = [f"{name}.{number}" for number in range(len(model.get_submodule(name)))]
        batches, roots = _batches(text), _roots(experiment, len(names))
        dense_blocks, states = record_blocks(dense, names, batches)
        blocks = [Block(model, block.name, block.calls) for block in dense_blocks]
        allowed = 0.0
        for way in ways:
            start, trained = time.monotonic(), trainable_(model)
            train_blocks_(model, blocks, dense_blocks, states, roots, way, epochs, arithmetic)
            put_parameters(model, frozen(model, trained))
            seconds = time.monotonic() - start
            allowed = allowed or seconds
            judged(f"blocks, rate {way.rate:g}" + f", {way.ahead} block ahead" * bool(way.ahead), seconds)
            put_parameters(model, begun)
        plan = HealingPlan(minutes=allowed / 60)
        with console.stage("heal", 1, "tokens") as stage:
            longer = heal_text(experiment.loaded, "text", _ROW, 0, int(1000 * allowed))
            healed = heal_(model, dense, longer, judges["search"], plan, None, stage)
        judged("healed whole", healed.measurements[-1].seconds)
    header = ["model", "seconds", *(f"KL on {text} text" for text in judges), "perplexity on search text"]
    body = (
        f"SmolLM2-135M-Instruct with the schedule of `{arguments.prior.name}`, repaired. Blocks are trained on "
        f"{tokens:,} tokens, {epochs} times, {_ROW * _ROWS:,} tokens a step; healing reads new text, in steps of "
        f"{plan.batch_tokens} tokens. KL in nats per token.\n\n{markdown(header, rows)}"
    )
    publish("benchmarks.block_training", "Training block by block", body, [], arguments.write)


if __name__ == "__main__":
    main()
