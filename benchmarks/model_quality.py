"""Measures the KL of the whole model without healing, adding the techniques of the engine one by one.

    python -m benchmarks.model_quality [--quick] [--write] [--kept 0.9 0.8 0.7 0.6 0.5] [--variants …]

All variants are measured on the same held-out text. Every variant uses the closed-form allocation over its menu and no
search. In the following list, each variant includes all earlier ones unless it names another:

* lowrank: two full factors per site, χ(out + in) parameters, with C and G in which all tokens count equally. This is
  the reference of the bars.
* pivoted: the same matrices without gauge freedom, χ(out + in − χ) parameters.
* weighted: tokens are weighted in C and G, see `compression.calibration.statistics`.
* menu: the lower envelope also contains fitted MPOs of two cores (balanced legs, and legs that follow the heads).
* widths: `weighted`, but the MLPs lose hidden units and the attentions key/value groups, with an exact refit of the
  matrix that reads them, and nothing is decomposed.
* joint: `weighted`, with the widths of MLPs and attentions and the χ of what is left in one menu.
* corrected: the costs of blocks and families are weighted by their measured worth in the compressed model, including
  the effect of errors elsewhere. The gradient agent measures it with six backward passes on search text.
* sequential: `menu`, with each site decomposed in the metric of the input that the earlier compressed sites give it.
* repaired: `sequential`, with every site first solved to reproduce the dense model's output or residual stream.
* repaired-widths, repaired-joint: `widths` and `joint`, repaired in the same way.
* complete: `repaired`, with the schedule of `corrected`.
* sparse: every matrix is pruned to numbers of 16 bits or stays dense. The budget is the same share of the bytes at 16
  bits a number, and the bit per entry that says which are stored counts (see `compression.size`).
* small: all that runs with `--form small` have from a kept fraction of 0.22 on, by the same bytes: matrices of 2 to 8
  bits, and the widths and χ of `joint`.
* repaired-small: `small`, repaired; pruned matrices keep their masks, and all are rounded again.

The held-out text consists of two corpora, prose and exam questions with their answers, which are scored separately.
Nothing is tuned on it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from agents import AgentContext, Gradient
from benchmarks.report import Bar, markdown, publish
from compression import Menu, Schedule, envelope, fitted_topologies, lagrangian, to_schedule
from compression.decomposition.apply import ScheduleApplier
from compression.decomposition.entry_store import EntryForms
from compression.decomposition.factors import FactorStore
from compression.decomposition.repair import repair_
from compression.schedule import Form
from compression.sites import put_modules
from compression.size import SizeModel
from envs import Problem
from search.config import BYTES, EMBEDDING_BITS, Config
from search.evaluation.quality import Quality, paired_kl
from search.evaluation.workload import Workload
from search.experiment.calibration import factor_store
from search.experiment.experiment import Experiment, workload_sequences
from search.experiment.open_model import open_model
from search.model.architecture import head_size

VARIANTS = (
    "lowrank",
    "pivoted",
    "weighted",
    "widths",
    "joint",
    "menu",
    "corrected",
    "sequential",
    "repaired",
    "repaired-widths",
    "repaired-joint",
    "complete",
    "sparse",
    "small",
    "repaired-small",
)
_BONDED: dict[str, Form] = {"widths": "plain", "joint": "any"}
_REPAIRED = {
    "sequential": "menu",
    "repaired": "menu",
    "repaired-widths": "widths",
    "repaired-joint": "joint",
    "repaired-small": "small",
}
"""Variants that visit the blocks in order, by the variant whose menu they take."""
_BY_BYTES = ("sparse", "small", "repaired-small")
"""Variants whose budget is in bytes."""
_BARS = {0.8: 0.06, 0.62: 0.25}
"""Goals of their KL in nats per token, by the share of the bytes."""
_PASSES = 6


@dataclass(eq=False)
class Bench:
    """An experiment with its menus and held-out workloads; menus and schedules are made when first needed."""

    experiment: Experiment
    fitted_families: Sequence[str]
    workloads: dict[str, Workload]
    _menus: dict[str, Menu] = field(default_factory=dict)
    _corrected: dict[float, Schedule] = field(default_factory=dict)

    @classmethod
    def of(cls, experiment: Experiment, fitted_families: Sequence[str]) -> Bench:
        held, model = experiment.splits.heldout_text, experiment.loaded.model

        def workload(corpus: str) -> Workload:
            text = [(name, chunk) for name, chunk in held.labelled if name == corpus]
            made = Workload(workload_sequences(experiment.loaded, [], "mmlu", "answer", text), model)
            made.reference(model)
            return made

        corpora = {corpus: workload(corpus) for corpus in ("prose", "exam")}
        return cls(experiment, fitted_families, corpora)

    @cached_property
    def unweighted(self) -> FactorStore:
        """Factors in the metric in which all tokens count equally."""
        experiment = self.experiment
        calibration = experiment.calibration.unweighted
        return factor_store(experiment.loaded, experiment.sites, calibration, calibration.cache)

    @cached_property
    def small(self) -> FactorStore:
        """Factors, and matrices in all numbers of bits that runs with `--form small` have."""
        experiment, calibration = self.experiment, self.experiment.calibration
        forms = EntryForms(EMBEDDING_BITS, prunes=False)
        return factor_store(experiment.loaded, experiment.sites, calibration, calibration.cache, forms)

    def store(self, variant: str) -> FactorStore:
        variant = _REPAIRED.get(variant, variant)
        if variant == "small":
            return self.small
        return self.unweighted if variant in ("lowrank", "pivoted") else self.experiment.store

    def menu(self, variant: str) -> Menu:
        variant = _REPAIRED.get(variant, variant)
        kind = variant if variant in ("lowrank", "pivoted", "weighted", *_BONDED) else "menu"
        if kind not in self._menus:
            store, size = self.store(kind), head_size(self.experiment.loaded.model)
            fitted = {
                site.name: fitted_topologies(site, size)
                for site in store.sites
                if kind == "menu" and site.family in self.fitted_families
            }
            topology = "lowrank" if kind == "lowrank" else "pivoted-lowrank"
            self._menus[kind] = store.menu(topology=topology, fitted=fitted, form=_BONDED.get(kind, "factors"))
        return self._menus[kind]

    def schedule(self, variant: str, kept: float) -> Schedule:
        if variant in _BY_BYTES:
            return self.by_bytes(_REPAIRED.get(variant, variant), kept)
        menu = self.menu(variant)
        if variant in ("corrected", "complete"):
            return self.corrected(kept)
        return to_schedule(menu, lagrangian(menu, math.floor(kept * menu.dense_parameters)))

    @contextmanager
    def compressed(self, variant: str, kept: float) -> Iterator[Schedule]:
        """Compresses the model by a variant within the context, and makes it dense again afterwards."""
        model, schedule = self.experiment.loaded.model, self.schedule(variant, kept)
        if variant not in (*_REPAIRED, "complete"):
            with ScheduleApplier(model, self.store(variant)) as applier:
                applier.apply_(schedule)
                yield schedule
            return
        store, config, calibration = self.store(variant), self.experiment.config, self.experiment.calibration
        batches, order = self.experiment.repair_batches(config.repair_tokens), store.bonds.elimination
        correct = variant != "sequential"
        how = calibration(), batches, config.shrinkage, order, correct
        taken = repair_(model, store.sites, schedule, *how, entries=store.entries.entries)
        try:
            yield schedule
        finally:
            put_modules(model, taken)

    def by_bytes(self, variant: str, kept: float) -> Schedule:
        """The closed form over all that a variant has, at a share of the bytes at 16 bits a number."""
        if variant not in self._menus:
            store = self.store(variant)
            price = SizeModel(self.experiment.loaded.model, store.sites, BYTES).choice_bytes
            if variant == "small":
                self._menus[variant] = store.menu(form="small", price=price)
            else:
                offered = {
                    site.name: () if site.dense_because else store.entries.options(site.name) for site in store.sites
                }
                self._menus[variant] = Menu(tuple(envelope(site, offered[site.name], price) for site in store.sites))
        menu = self._menus[variant]
        return to_schedule(menu, lagrangian(menu, math.floor(kept * menu.dense_parameters)))

    def corrected(self, kept: float) -> Schedule:
        """The schedule that the gradient agent believes best after a few passes; computed once per kept fraction."""
        if kept not in self._corrected:
            problem = Problem.build(self.menu("menu"), kept, "block+family")
            agent = Gradient(problem, AgentContext(0, budget=4 * _PASSES, shards=self.experiment.search_shards))
            with self.experiment.evaluator("search", problem.closed_form()) as evaluator:
                while proposals := agent.ask(1):
                    [proposal] = proposals
                    assert proposal.probe is not None
                    agent.tell_slopes(proposal, evaluator.slopes(proposal.schedule, proposal.probe, proposal.repeat))
                    agent.tell(proposals, [0.0])
            self._corrected[kept] = agent.recommend(1)[0].schedule
        return self._corrected[kept]


def _read(file: Path | None) -> dict[tuple[str, float], dict[str, Quality]]:
    """Figures of earlier runs with the same text and code, by variant and kept fraction."""
    if file is None or not file.exists():
        return {}
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())

    def quality(values: dict[str, Any]) -> Quality:
        return Quality(**{name: tuple(each) if isinstance(each, list) else each for name, each in values.items()})

    return {(variant, kept): {name: quality(each) for name, each in found.items()} for variant, kept, found in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="use two kept fractions, four variants and less text")
    parser.add_argument("--write", action="store_true", help="write the table to results/")
    parser.add_argument("--kept", type=float, nargs="+", help="kept fractions over the sites")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, help="variants to measure; lowrank is added where compared"
    )
    parser.add_argument(
        "--fitted-families",
        nargs="*",
        default=["v"],
        help="families whose menus contain fitted MPOs (default: v, where an MPO can win)",
    )
    parser.add_argument("--measured", type=Path, help="keep figures in this file and reuse those in it")
    parser.add_argument("--only-measured", action="store_true", help="measure nothing; use the figures in --measured")
    parser.add_argument("--heldout-tokens", type=int, default=4096, help="held-out tokens (default: 4096)")
    parser.add_argument("--repair-tokens", type=int, default=Config().repair_tokens, help="as for search.py")
    parser.add_argument("--calibration-tokens", type=int, default=Config().calibration_tokens, help="as for search.py")
    arguments = parser.parse_args()
    quick = arguments.quick
    fractions = arguments.kept or ([0.8, 0.5] if quick else [0.9, 0.8, 0.7, 0.6, 0.5])
    wanted = arguments.variants or (("lowrank", "pivoted", "weighted", "repaired") if quick else VARIANTS)
    compared = not set(wanted) <= set(_BY_BYTES)  # which have goals of their own
    variants = [name for name in VARIANTS if name in wanted or (compared and name == "lowrank")]
    config = Config(
        dtype="float32",  # in bfloat16 any change of the weights costs 0.002 nats
        calibration_tokens=arguments.calibration_tokens,
        heldout_tokens=1024 if quick else arguments.heldout_tokens,
        repair_tokens=min(4096 if quick else sys.maxsize, arguments.repair_tokens),
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded, sites = open_model(config, device)
    bench = Bench.of(
        Experiment.of(config, loaded, sites, device),
        arguments.fitted_families,
    )
    quality = _read(arguments.measured)
    for variant in variants:
        for kept in fractions:
            if (variant, kept) in quality or arguments.only_measured:
                continue
            start = time.perf_counter()
            with bench.compressed(variant, kept) as schedule:
                made = time.perf_counter() - start
                measured = {name: workload.measure(loaded.model) for name, workload in bench.workloads.items()}
            quality[variant, kept] = measured
            if arguments.measured:
                row = [variant, kept, {name: asdict(value) for name, value in measured.items()}]
                with arguments.measured.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            mpos = sum("mpo" in choice.topology for _, choice in schedule)
            dense = sum(choice.is_dense for _, choice in schedule)
            figures = " ".join(f"{name} {value.kl:.4f}" for name, value in measured.items())
            print(f"{variant} kept {kept}: {figures}; {dense} dense, {mpos} MPO; made in {made:.0f} s", flush=True)
    rows = []
    for variant in variants:
        for name in bench.workloads:
            cells: list[object] = [variant, name]
            for kept in fractions:
                if (variant, kept) in quality:
                    value, reference = quality[variant, kept][name], quality.get(("lowrank", kept))
                    share = f" ({value.kl / reference[name].kl:.2f})" if reference else ""
                    cells.append(f"{value.kl:.4f}{share}")
                else:
                    cells.append("not run")
            rows.append(cells)
    text = bench.experiment.splits
    counts = ", ".join(f"{name} {w.tokens:,} tokens in {len(w.sequences)}" for name, w in bench.workloads.items())
    errors = []
    for kept in fractions:
        for name in bench.workloads:
            for variant in [each for each in variants[compared:] if compared and (each, kept) in quality]:
                difference = paired_kl(quality[variant, kept][name], quality["lowrank", kept][name])
                errors.append([variant, name, kept, f"{difference.value:+.4f} ± {difference.standard_error:.4f}"])
    repaired = f"the first {config.repair_tokens:,}" if config.repair_tokens < text.calibration.tokens else "all"
    body = (
        "KL(dense ‖ compressed) in nats per token of SmolLM2-135M-Instruct without healing, closed-form allocation"
        f"{', and in brackets its ratio to `lowrank` at the same kept fraction' * compared}. "
        f"Held-out text: {counts} sequences. "
        f"Calibration text: {text.calibration.tokens:,} tokens, {repaired} of them for repair. The menu has fitted "
        f"MPOs for the families {', '.join(bench.fitted_families)}. benchmarks/model_quality.py explains the "
        "variants.\n\n" + markdown(["variant", "corpus", *(f"kept {kept}" for kept in fractions)], rows)
    )
    if compared:
        body += "\n\nDifference from `lowrank`, paired over sequences, ± one standard error:\n\n"
        body += markdown(["variant", "corpus", "kept", "nats per token"], errors)
    bars = [
        Bar(f"{variant}_over_lowrank_{name}_{kept}", value[name].kl / quality["lowrank", kept][name].kl, "<=", 0.8)
        for (variant, kept), value in quality.items()
        for name in bench.workloads
        if compared and variant != "lowrank" and variant in variants and kept in fractions
    ]
    bars += [
        Bar(f"{variant}_{name}_{kept}", value[name].kl, "<=", _BARS[kept])
        for (variant, kept), value in quality.items()
        for name in bench.workloads
        if variant in _BY_BYTES and variant in variants and kept in fractions and kept in _BARS
    ]
    publish("benchmarks.model_quality", "Whole-model quality without healing", body, bars, arguments.write)


if __name__ == "__main__":
    main()
