"""Measures whether a prior found on one model saves evaluations or improves quality on another.

    python -m benchmarks.transfer [--quick] [--write] [--models A B] [--budget 60] [--seeds 0 1 2] [--target-kept 0.8]
        [--rules price chi] [--form factors] [--calibration-tokens 24576] [--heldout-tokens 3072] …

Priors are transferred both ways between two models, by default the default model and Gemma 3 270M. For each direction
the benchmark makes a cold search, which starts from the closed form, and a warm search with the same agent, budget,
seed and data, which starts from the prior of the other model's cold search. It also measures that prior without any
evaluation, transferred by each rule of `search.priors.transfer` ("bare"). It reports the held-out KL of all, and the
first trial of the warm search that is as good as the best trial of the cold search, both by the KL measured in trials.

Every search has its own folder under `--runs`; a finished search found there is not repeated. `--quick` uses two tiny
random models; it shows that the code works, and nothing about priors.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from agents import SLOPES_COST
from benchmarks.lab_models import lab_model
from benchmarks.report import RESULTS, Bar, markdown, publish
from search.config import FORMS, Config
from search.pipeline.apply import apply
from search.pipeline.run import run
from search.priors.format import Prior
from search.priors.transfer import RULES, Rule
from search.reporting.frames import read_records
from search.runtime.console import Console
from search.runtime.run_folder import PRIOR, SUMMARY, TRIALS

QUICK: dict[str, Any] = dict(calibration_tokens=1500, search_items=2, search_text_tokens=128, search_shards=2)
QUICK |= dict(heldout_tokens=600, report_items=6, budget=8)
SIZES = (
    *("calibration_tokens", "search_shards", "search_text_tokens", "search_items"),
    *("heldout_tokens", "report_items"),
)
"""Fields of the configuration that have a flag here."""


class Figure(NamedTuple):
    """Held-out KL in nats per token, its standard error over sequences, and the number of tokens."""

    value: float
    error: float
    tokens: int

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f}"


@dataclass(frozen=True)
class Outcome:
    """Result of one direction and seed; trials are counted from 1.

    Attributes:
        source: model on which the prior was found.
        target: model on which the searches were made.
        seed: seed of the searches.
        closed_form: KL of the closed form on the target.
        bare: KL of the prior without any evaluation, by rule.
        cold: KL found by the cold search.
        warm: KL found by the warm search.
        cold_best_at: number of the cold search's best trial.
        reached: number of the first warm trial as good as the best cold trial; NaN if there is none.
    """

    source: str
    target: str
    seed: int
    closed_form: Figure
    bare: Mapping[str, Figure]
    cold: Figure
    warm: Figure
    cold_best_at: int
    reached: float


def search(config: Config, folder: Path) -> dict[str, Any]:
    """Returns the summary of the run in `folder`; starts or resumes the run if it is not finished."""
    if not (folder / SUMMARY).exists():
        known = {"resume": str(folder)} if (folder / "config.json").exists() else {"out": str(folder)}
        with Console() as console:
            run(Config.of({**config.model_dump(exclude={"out", "resume"}), **known}), console)
    document: dict[str, Any] = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    return document


def applied(config: Config, prior: Path, rule: Rule, folder: Path) -> Figure:
    """Held-out KL of a prior transferred by a rule without any evaluation."""
    if not (folder / SUMMARY).exists():
        values = config.model_dump(exclude={"out", "resume", "prior"})
        with Console() as console:
            wanted = Config.of({**values, "out": str(folder)})
            apply(wanted, Prior.read(prior), console, config.target_kept, rule)
    document = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    return held_out(document, "prior")


def held_out(document: dict[str, Any], schedule: str) -> Figure:
    """Held-out KL in one row of a summary; NaN if the row has none."""
    [row] = [row for row in document["rows"] if row["schedule"] == schedule]
    value, error = (math.nan if row[name] is None else float(row[name]) for name in ("kl", "kl_stderr"))
    return Figure(value, error, row["tokens"])


def trial_kl(folder: Path) -> list[float]:
    """KL of the trials in order, with the control variate as in rewards; infinite for a failed trial."""
    rows = sorted(read_records(folder / TRIALS), key=lambda row: int(row["trial"]))
    return [float(row["kl"]) + float(row["kl_control"] or 0) if row["kl"] else math.inf for row in rows]


def first_as_good(values: Sequence[float], bound: float) -> float:
    """Position, counted from 1, of the first of `values` that is at most `bound`; NaN if there is none."""
    return next((float(count) for count, value in enumerate(values, 1) if value <= bound), math.nan)


def outcome(
    configs: dict[str, Config], source: str, target: str, seed: int, runs: Path, rules: Sequence[Rule]
) -> Outcome:
    """Measures one direction: cold searches of both models, then the warm search and the bare prior on the target."""

    def folder(kind: str, model: str) -> Path:
        return runs / f"{kind}-{model}-{seed}"

    def seeded(model: str, **changes: object) -> Config:
        return Config.of({**configs[model].model_dump(exclude={"quick", "out", "resume"}), "seed": seed, **changes})

    search(seeded(source), folder("cold", source))
    prior = folder("cold", source) / PRIOR
    cold = search(seeded(target), folder("cold", target))
    warm = search(seeded(target, prior=str(prior)), folder("warm", target))
    bare = {rule: applied(seeded(target), prior, rule, folder(f"bare-{rule}", target)) for rule in rules}
    cold_trials, warm_trials = (trial_kl(folder(kind, target)) for kind in ("cold", "warm"))
    best = min(cold_trials)
    return Outcome(
        source=source,
        target=target,
        seed=seed,
        closed_form=held_out(cold, "lagrangian"),
        bare=bare,
        cold=held_out(cold, "searched"),
        warm=held_out(warm, "searched"),
        cold_best_at=1 + cold_trials.index(best),
        reached=first_as_good(warm_trials, best),
    )


def report(outcomes: Sequence[Outcome], budget: int) -> tuple[str, list[Bar]]:
    """Returns the report, and one bar per direction: the warm search is at least as good as the cold one."""
    header = ("prior of, on", "seed", "closed form", *(f"bare, by {rule}" for rule in outcomes[0].bare), "cold", "warm")
    rows = [
        (
            f"{one.source}, {one.target}",
            one.seed,
            one.closed_form,
            *one.bare.values(),
            one.cold,
            one.warm,
            one.cold_best_at,
            "never" if math.isnan(one.reached) else f"{one.reached:.0f}",
        )
        for one in outcomes
    ]
    tokens = " and ".join(f"{one.closed_form.tokens:,} tokens of {one.target}" for one in outcomes[:2])
    text = (
        f"Held-out KL to the dense model on {tokens}, in nats per token, ± one standard error over sequences. All "
        "columns share the sequences, so their differences are more precise than these errors. Each search has "
        f"{budget} evaluations; a trial with slopes, as `gradient` makes them, counts as {SLOPES_COST}. The last two "
        "columns give the number of the cold search's best trial, and of the first trial of the warm search that was "
        "as good, by the KL measured in trials.\n\n"
    )
    bars = []
    for way in dict.fromkeys((one.source, one.target) for one in outcomes):
        of = [one for one in outcomes if (one.source, one.target) == way]
        value = fmean(one.warm.value for one in of) / fmean(one.cold.value for one in of)
        bars.append(Bar(f"warm_over_cold_kl_on_{way[1]}", value, "<=", 1.0))
    return text + markdown((*header, "cold best", "warm as good"), rows), bars


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="use two tiny random models and one seed")
    parser.add_argument("--write", action="store_true", help="write the table to results/")
    parser.add_argument("--models", nargs=2, metavar=("A", "B"), help="models (default: default and Gemma 3 270M)")
    parser.add_argument("--agent", default=Config().agent, help="agent, as for search.py")
    parser.add_argument("--budget", type=int, default=60, help="evaluations per search (default: 60)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (default: 0 1 2)")
    parser.add_argument("--target-kept", type=float, default=0.8, help="as for search.py (default: 0.8)")
    parser.add_argument("--runs", type=Path, default=RESULTS / "transfer-runs", help="folder that keeps the runs")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES), help="rules to transfer bare priors")
    parser.add_argument("--form", choices=FORMS, default=Config().form, help="as for search.py")
    for name in SIZES:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=getattr(Config(), name), metavar="N", help="as for search.py")
    given = parser.parse_args()
    values: dict[str, Any] = {name: getattr(given, name) for name in ("agent", "budget", "target_kept", "form", *SIZES)}
    values |= {"repair_tokens": 0, "heal_minutes": 0}  # repair and healing would mask differences in allocation
    if given.quick:
        models, seeds, values = ["random:tiny-llama", "random:tiny-qwen2"], [0], values | QUICK
    else:
        models, seeds = given.models or ["default", str(lab_model("gemma-3-270m"))], given.seeds
    configs = {Path(model).stem.replace(":", "-"): Config.of({**values, "model": model}) for model in models}
    first, second = configs
    ways = [(source, target, seed) for seed in seeds for source, target in ((first, second), (second, first))]
    outcomes = [outcome(configs, *way, given.runs, given.rules) for way in ways]
    body, bars = report(outcomes, int(values["budget"]))
    publish("benchmarks.transfer", "Priors from one model to another", body, bars, given.write)


if __name__ == "__main__":
    main()
