"""Speed of healing the compressed model against full fine-tuning of the dense one, side by side.

    python -m benchmarks.heal_speed [--quick] [--write] [--kept 0.3 0.45 0.6 0.8] [--rounds 3]

One step is a forward and a backward pass over the same rows and an AdamW step. Fine-tuning trains every parameter of
the dense model on next tokens, with the logits over the whole vocabulary that its own loss makes. Healing on labels
trains cores and norms on the same task; healing by distillation also computes what the dense model predicts, first with
the dense model's forward pass and then, as in every later epoch, from targets that are kept; of the vocabulary it
computes, as healing does, the targets and a sample of the others, and in a row of its own all. Schedules are uniform.
The sides take turns; figures are medians of the rounds. Peak memory is that of a process of its own for every side.

On a GPU passes are larger, all tokens are computed, arithmetic is bfloat16, and blocks are replayed as CUDA graphs, as
healing does there; fine-tuning is shown as it is usually done and with its blocks replayed too. Peak memory is what a
side keeps, the dense model's parameters where it needs them, and what a step of it adds.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from contextlib import ExitStack
from statistics import median
from typing import Any

import torch

from benchmarks.memory import peak_resident
from benchmarks.report import Bar, markdown, publish
from compression import MPOLinear, discover_sites
from compression.numerics.gauge import stored
from compression.numerics.legs import resolve
from compression.sites import dense_weight, find_blocks
from compression.training.distillation import Head, divergence, labels, likeliest
from compression.training.replay import replayed
from compression.training.trainable import captured_head_input, trainable_
from search.healing.plan import HealingPlan
from search.model.loading import load_model

SIDES = ("fine-tuning", "labels", "distill", "distill, kept targets", "distill, all tokens, kept targets")
GPU_SIDES = ("fine-tuning", "fine-tuning, replayed", "labels", "distill", "distill, kept targets")
_PLAN = HealingPlan(tokens=1)


def compressed(dense: Any, kept: float) -> Any:
    """Uniform pivoted low rank with factors of random entries: their values do not matter for speed."""
    model = copy.deepcopy(dense)
    generator = torch.Generator().manual_seed(0)
    for site in discover_sites(model):
        legs = resolve("pivoted-lowrank", site.out_features, site.in_features)
        chi = legs.largest_chi(int(kept * site.parameters))
        weight = dense_weight(model.get_submodule(site.name))
        left = torch.randn(site.out_features, chi, generator=generator)
        right = left.T.to(weight.device) @ weight.float() / site.out_features
        cores = [left.reshape(1, -1, 1, chi).to(weight), right.reshape(chi, 1, -1, 1).to(weight)]
        model.set_submodule(site.name, MPOLinear(stored(cores, True)))
    return model


class Side:
    """One way of training, step by step."""

    def __init__(self, name: str, dense: Any, smaller: Any, rows: int, length: int) -> None:
        self.name, self.dense = name, dense
        self.device = dense.device
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(dense.config.vocab_size, (rows, length), generator=generator).to(self.device)
        self.head = Head(dense.get_output_embeddings().weight.detach())
        before = self._allocated()
        if name.startswith("fine-tuning"):
            self.model = copy.deepcopy(dense).float().requires_grad_(True)
            parameters = list(self.model.parameters())
        else:
            self.model = copy.deepcopy(smaller)
            parameters = list(trainable_(self.model).values())
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
        self.targets = self._targets() if name.endswith("kept targets") else None
        self.replays = ExitStack()
        self.replayed = self.device.type == "cuda" and name != "fine-tuning"
        if self.replayed:
            prefix, _ = find_blocks(dense)
            if name == "distill":
                with torch.no_grad():
                    self.replays.enter_context(replayed(dense, list(dense.get_submodule(prefix)), self.ids))
            with self._autocast():
                blocks = list(self.model.get_submodule(prefix))
                self.replays.enter_context(replayed(self.model, blocks, self.ids))
        self.step()  # makes what the optimizer keeps
        self.kept = self._allocated() - before + (2 * dense.num_parameters() if name == "distill" else 0)

    def step(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        with self._autocast():
            if self.name.startswith("fine-tuning"):
                loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
            else:
                targets = self.targets or (
                    labels(self.ids.roll(-1, 1).flatten()) if self.name == "labels" else self._targets()
                )
                with captured_head_input(self.model) as caught:
                    self.model(input_ids=self.ids, use_cache=False)
                everything = self.name == "labels" or "all tokens" in self.name or self.device.type == "cuda"
                sample = 0 if everything else _PLAN.sample
                loss = divergence(caught[0].flatten(0, 1), self.head, targets, sample) / self.ids.numel()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.replayed)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def peak_gb(self) -> float:
        """What this side alone takes on a GPU at most."""
        torch.cuda.reset_peak_memory_stats()
        before = self._allocated()
        self.step()
        return (self.kept + torch.cuda.max_memory_allocated() - before) / 1e9

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def _targets(self) -> Any:
        with torch.no_grad(), captured_head_input(self.dense) as caught:
            self.dense(input_ids=self.ids, use_cache=False)
        return likeliest(caught[0].flatten(0, 1), self.head, _PLAN.targets)


def peak(arguments: argparse.Namespace, side: str, kept: float) -> float:
    """Gigabytes that one side alone takes at most, the dense model among them where it is needed."""
    words = [sys.executable, "-m", "benchmarks.heal_speed", "--alone", side, "--kept", str(kept)]
    words += ["--model", arguments.model, "--rows", str(arguments.rows), "--length", str(arguments.length)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="two kept fractions, one round of small steps")
    parser.add_argument("--write", action="store_true", help="keep the table in results/")
    parser.add_argument("--kept", type=float, nargs="+")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--model", default="default")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--alone", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quick = arguments.quick
    gpu = torch.cuda.is_available()
    names = GPU_SIDES if gpu else SIDES
    arguments.rows = arguments.rows or (32 if gpu else 2 if quick else 8)
    fractions = arguments.kept or ([0.3, 0.6] if quick else [0.3, 0.45, 0.6, 0.8])
    rounds = arguments.rounds or (1 if quick else 3)
    dense = load_model(arguments.model, dtype=torch.bfloat16 if gpu else torch.float32).model
    if arguments.alone:
        Side(arguments.alone, dense, compressed(dense, fractions[0]), arguments.rows, arguments.length)
        print(json.dumps(peak_resident() / 1e9))
        return
    rows, bars = [], []
    tokens = arguments.rows * arguments.length
    for kept in fractions:
        smaller = compressed(dense, kept)
        sides = [Side(name, dense, smaller, arguments.rows, arguments.length) for name in names]
        times = [[side.step() for side in sides] for _ in range(rounds)]
        speeds = [tokens / median(column) for column in zip(*times, strict=True)]
        ratios = [median(row[0] / row[index] for row in times) for index in range(len(names))]
        peaks = [side.peak_gb() for side in sides] if gpu else []
        for side in sides:
            side.replays.close()
        del sides, side, smaller
        peaks = peaks or [peak(arguments, name, kept) for name in names]
        for name, speed, ratio, memory in zip(names, speeds, ratios, peaks, strict=True):
            rows.append([name, kept, f"{speed:,.0f}", f"{ratio:.2f}", f"{memory:.2f}"])
            print(*rows[-1], flush=True)
            if not name.startswith("fine-tuning") and kept in (0.3, 0.6):
                least = 2.0 if kept == 0.3 else 1.0
                bars.append(Bar(f"{name.replace(', ', '_').replace(' ', '_')}_speedup_{kept}", ratio, ">=", least))
    body = (
        f"Training of {arguments.model} in steps of {arguments.rows} rows of {arguments.length} tokens; speed in "
        "tokens per second, `times` over full fine-tuning of the dense model in the same rounds, peak memory in GB. "
        "What the sides are stands in benchmarks/heal_speed.py.\n\n"
        + markdown(["training", "kept", "tokens/s", "times", "peak GB"], rows)
    )
    publish("benchmarks.heal_speed", "Speed of healing", body, bars, arguments.write)


if __name__ == "__main__":
    main()
