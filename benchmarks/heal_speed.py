"""Compares the speed of healing the compressed model with that of full fine-tuning of the dense model.

    python -m benchmarks.heal_speed [--quick] [--write] [--kept 0.3 0.45 0.6 0.8] [--rounds 3] [--form plain]

One step is a forward and a backward pass over the same rows and a step of the optimizer. The kinds of training are:

* fine-tuning: trains every parameter of the dense model on next tokens, with logits over the whole vocabulary.
* labels: heals cores and norms on the same next-token loss.
* distill: heals toward the dense model's probabilities of all tokens, computed by its forward pass, as healing does
  unless told otherwise.
* distill, kept targets: heals toward stored probabilities of the 64 likeliest tokens, as in every epoch after the first
  of a healing with such targets, and computes only their logits and those of a sample of the other tokens.
* distill, all tokens, kept targets: the same with the logits of all tokens.

Schedules are uniform and have no widths. `--form` cuts the default model by the closed form instead, with bonds between
matrices (`any`) or those alone (`plain`). The kinds take turns; figures are medians over the rounds. Peak memory is
measured in a separate process for every kind.

On a GPU, passes are larger, logits of all tokens are computed, arithmetic is bfloat16, and blocks are replayed as CUDA
graphs, as healing does there. Fine-tuning is shown both as it is usually done and with replayed blocks. Peak memory is
then the memory that a kind keeps, including the dense model's parameters if it needs them, plus that which one step
adds.
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

from benchmarks.default_folders import cut_default
from benchmarks.memory import peak_resident
from benchmarks.report import Bar, markdown, publish
from compression import MPOLinear, discover_sites
from compression.numerics.gauge import stored
from compression.numerics.legs import resolve
from compression.schedule import Form
from compression.sites import dense_weight, find_blocks
from compression.training.distillation import Distributions, Head, Targets, divergence, labels, likeliest
from compression.training.optimizer import FactoredRMSprop
from compression.training.replay import replayed
from compression.training.trainable import captured_head_input, trainable_
from search.healing.plan import HealingPlan
from search.model.loading import load_model

SIDES = ("fine-tuning", "labels", "distill", "distill, kept targets", "distill, all tokens, kept targets")
GPU_SIDES = ("fine-tuning", "fine-tuning, replayed", "labels", "distill", "distill, kept targets")
_PLAN = HealingPlan(tokens=1, targets=64, sample=1024)


def compressed(dense: Any, kept: float, form: Form | None = None) -> Any:
    """Returns the default model cut by the closed form, or a uniform pivoted low-rank model with random factors.

    Values do not matter for speed.
    """
    if form:
        with cut_default(kept, form) as cut:
            return copy.deepcopy(cut.model).to(dense.dtype)
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
    """One kind of training, which runs step by step."""

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
        self.optimizer = FactoredRMSprop([{"params": parameters, "lr": 1e-6}])
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
        self.step()  # allocates the optimizer's state
        self.kept = self._allocated() - before + (2 * dense.num_parameters() if name == "distill" else 0)

    def step(self) -> float:
        """Makes one step and returns its seconds."""
        start = time.perf_counter()
        with self._autocast():
            if self.name.startswith("fine-tuning"):
                loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
            else:
                targets = self.targets or (
                    labels(self.ids.roll(-1, 1).flatten()) if self.name == "labels" else self._distributions()
                )
                with captured_head_input(self.model) as caught:
                    self.model(input_ids=self.ids, use_cache=False)
                sample = _PLAN.sample if self.name == "distill, kept targets" and self.device.type == "cpu" else 0
                loss = divergence(caught[0].flatten(0, 1), self.head, targets, sample) / self.ids.numel()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not self.replayed)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def peak_gb(self) -> float:
        """Peak GPU memory of this kind of training alone, in GB."""
        torch.cuda.reset_peak_memory_stats()
        before = self._allocated()
        self.step()
        return (self.kept + torch.cuda.max_memory_allocated() - before) / 1e9

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def _distributions(self) -> Distributions:
        with torch.no_grad(), captured_head_input(self.dense) as caught:
            self.dense(input_ids=self.ids, use_cache=False)
        return Distributions(caught[0].flatten(0, 1), self.head)

    def _targets(self) -> Targets:
        return likeliest(self._distributions().hidden, self.head, _PLAN.targets)


def peak(arguments: argparse.Namespace, side: str, kept: float) -> float:
    """Peak memory, in GB, of one kind of training in its own process, including the dense model if it is needed."""
    words = [sys.executable, "-m", "benchmarks.heal_speed", "--alone", side, "--kept", str(kept)]
    words += ["--model", arguments.model, "--rows", str(arguments.rows), "--length", str(arguments.length)]
    words += ["--form", arguments.form] if arguments.form else []
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="use two kept fractions and one round of small steps")
    parser.add_argument("--write", action="store_true", help="write the table to results/")
    parser.add_argument("--kept", type=float, nargs="+", help="kept fractions (default: 0.3 0.45 0.6 0.8)")
    parser.add_argument("--rounds", type=int, help="rounds (default: 3; quick: 1)")
    parser.add_argument("--model", default="default", help="model, as for search.py")
    parser.add_argument("--form", choices=("plain", "any"), help="cut the default model by the closed form")
    parser.add_argument("--rows", type=int, help="rows per step (default: 8; quick: 2; on a GPU: 32)")
    parser.add_argument("--length", type=int, default=256, help="tokens per row (default: 256)")
    parser.add_argument("--alone", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.form and arguments.model != "default":
        parser.error("--form cuts the default model; leave --model out")
    quick = arguments.quick
    gpu = torch.cuda.is_available()
    names = GPU_SIDES if gpu else SIDES
    arguments.rows = arguments.rows or (32 if gpu else 2 if quick else 8)
    fractions = arguments.kept or ([0.3, 0.6] if quick else [0.3, 0.45, 0.6, 0.8])
    rounds = arguments.rounds or (1 if quick else 3)
    dense = load_model(arguments.model, dtype=torch.bfloat16 if gpu else torch.float32).model
    if arguments.alone:
        Side(arguments.alone, dense, compressed(dense, fractions[0], arguments.form), arguments.rows, arguments.length)
        print(json.dumps(peak_resident() / 1e9))
        return
    rows, bars = [], []
    tokens = arguments.rows * arguments.length
    for kept in fractions:
        smaller = compressed(dense, kept, arguments.form)
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
                least = 2.0 if kept == 0.3 else 1.5 if arguments.form else 1.0
                bars.append(Bar(f"{name.replace(', ', '_').replace(' ', '_')}_speedup_{kept}", ratio, ">=", least))
    body = (
        f"Training of {arguments.model}{f', cut with form {arguments.form},' if arguments.form else ''} in steps of "
        f"{arguments.rows} rows of {arguments.length} tokens. `times` is the speed relative to full fine-tuning of the "
        "dense model in the same rounds. benchmarks/heal_speed.py explains the kinds of training.\n\n"
        + markdown(["training", "kept", "tokens/s", "times", "peak GB"], rows)
    )
    publish("benchmarks.heal_speed", "Speed of healing", body, bars, arguments.write, arguments.form or "")


if __name__ == "__main__":
    main()
