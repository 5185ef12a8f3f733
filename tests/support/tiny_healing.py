"""A tiny compressed model, its dense original and text to heal it on."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compression import discover_sites
from compression.layers.mpo_linear import MPOLinear
from compression.numerics.cores import decompose, truncate
from compression.numerics.gauge import stored
from compression.numerics.legs import resolve
from compression.sites import dense_weight
from search.evaluation.packed_sequences import packed_text
from search.evaluation.workload import Workload
from search.healing.plan import HealingPlan
from search.healing.rows import HealingText
from search.healing.training import Healed, heal_
from search.model.loading import load_model
from search.runtime.checkpoints import Checkpoint, Checkpoints
from search.runtime.console import Console

PLAN = HealingPlan(tokens=3000, batch_tokens=160, pass_tokens=80, targets=64, rate=3e-3, vector_rate=3e-3)


def subject(name: str = "random:tiny-llama", kept: float = 0.5) -> tuple[Any, Any, HealingText, Workload]:
    """A dense model, what plain low rank makes of it, text that the dense model finds likely, and other such text."""
    dense = load_model(name, "cpu").model
    model = deepcopy(dense)
    for site in discover_sites(model):
        legs = resolve("pivoted-lowrank", site.out_features, site.in_features)
        old = model.get_submodule(site.name)
        cores = decompose(dense_weight(old).double(), legs)[0]
        chi = legs.largest_chi(int(kept * site.parameters))
        cut = [core.float() for core in truncate(cores, chi)]
        model.set_submodule(site.name, MPOLinear(stored(cut, True), old.bias))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        starts = torch.randint(0, 256, (48, 4))
        rows = dense.generate(
            starts, attention_mask=torch.ones_like(starts), pad_token_id=0, do_sample=True, min_length=40, max_length=40
        )
    tokens = rows.to(torch.int32)
    text = HealingText(tokens[:40], torch.ones_like(tokens[:40], dtype=torch.bool), "sampled")
    judge = Workload([packed_text(row) for row in tokens[40:].tolist()], dense)
    judge.reference(dense)
    return dense, model, text, judge


def heal(
    model: Any, dense: Any, text: HealingText, judge: Workload, plan: HealingPlan = PLAN, folder: Path | None = None
) -> tuple[Healed, list[str]]:
    told: list[str] = []
    with Console(io.StringIO()).stage("heal") as stage:
        return heal_(model, dense, text, judge, plan, folder, stage, told.append), told


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def heal_again(folder: Path, tokens: Sequence[int], told: Path) -> None:
    """Heals for each number of tokens, from where the one before stood; writes what it measures into `told`.

    That is the KL after each, and before the end of each the share of the blocks that this process holds, if sharded.
    Checkpoints are written slowly, so that a process that does not wait for them would read an earlier one.
    """
    from torch.distributed.tensor import DTensor

    from search.healing.sharding import Sharding

    measured: dict[str, list[float | None]] = {"KL": [], "SHARE": []}
    ended, save = Sharding.end, Checkpoints.save

    def end(self: Sharding) -> None:
        held = [one for each in (model, dense) for one in each.parameters() if isinstance(one, DTensor)]
        measured["SHARE"].append(sum(one.to_local().numel() for one in held) / sum(one.numel() for one in held))
        ended(self)

    def slow_save(self: Checkpoints, checkpoint: Checkpoint) -> None:
        time.sleep(0.5)
        save(self, checkpoint)

    Sharding.end, Checkpoints.save = end, slow_save  # type: ignore[method-assign]
    for count in tokens:
        dense, model, text, judge = subject()
        heal(model, dense, text, judge, replace(PLAN, tokens=count), folder)
        measured["KL"].append(judge.measure(model).kl)
    told.write_text(json.dumps(measured))
