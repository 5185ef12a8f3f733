"""Measures whether the best schedule before healing is the best after it, by rank correlations at equal size.

    python -m benchmarks.heal_rank [--quick] [--write] [--schedules 13] [--tokens 24576] [--out DIR]

The schedules are, for the default model at kept fraction 0.618, the closed-form allocation, the uniform one, the one
that 200 evaluations found (the published prior of 94 M parameters), and closed-form allocations with random weights of
varying spread on the predicted costs of every block and family. Each schedule is measured after decomposition, after
repair if that is kept, and after healing on the same rows for the same number of tokens, on two held-out corpora. A
schedule that is recorded in --out is not healed again.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.healing import CORPORA, KEPT, Table
from benchmarks.report import RESULTS, Bar, markdown, publish
from compression import Menu, Schedule, ScheduleApplier, lagrangian, to_schedule, uniform
from compression.sites import members
from search.config import Config
from search.experiment.experiment import Experiment
from search.healing.plan import HealingOptions
from search.healing.run import heal_experiment_
from search.priors.format import Prior
from search.priors.transfer import exact_schedule
from search.profiling.sensitivity import rank_correlation
from search.runtime.console import Console

STATES = ("decomposed", "repaired", "healed")
SEARCHED = RESULTS / "priors" / "smollm2-135m-instruct-94m.json"
_SPREADS = (0.1, 0.2, 0.4, 0.8)  # standard deviations of the log weights of blocks and of families
_RESAMPLES = 2000


@dataclass(frozen=True)
class Outcome:
    """KL of one schedule, nats per token, by state and corpus."""

    name: str
    kl: Mapping[str, Mapping[str, float]]

    def mean(self, state: str) -> float:
        """Mean KL over the corpora in one state."""
        return float(np.mean(list(self.kl[state].values())))


def schedules(menu: Menu, count: int) -> list[tuple[str, Schedule]]:
    """Returns names and schedules of equal size; the same menu gives the same schedules."""
    target = math.floor(KEPT * menu.dense_parameters)
    sites = [site for options in menu.sites for site in members(options.site)]
    found = [
        ("closed form", to_schedule(menu, lagrangian(menu, target))),
        ("uniform", to_schedule(menu, uniform(menu, target))),
        ("searched", exact_schedule(Prior.read(SEARCHED), sites)),
    ]
    units = [options.site for options in menu.sites]
    blocks = np.array([unit.block for unit in units])
    kinds = np.unique([unit.family for unit in units], return_inverse=True)[1]
    generator = np.random.default_rng(0)
    for number in range(count - len(found)):
        spread = _SPREADS[number % len(_SPREADS)]
        weights = spread * generator.standard_normal(blocks.max() + 1)[blocks]
        weights = weights + spread * generator.standard_normal(kinds.max() + 1)[kinds]
        found.append((f"random {number + 1}, {spread:g}", to_schedule(menu, lagrangian(menu, target, weights))))
    return found[:count]


def interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap confidence interval of the rank correlation; schedules are resampled with replacement."""
    generator, one, two = np.random.default_rng(0), np.asarray(first), np.asarray(second)
    drawn = [generator.integers(len(one), size=len(one)) for _ in range(_RESAMPLES)]
    low, high = np.nanpercentile([rank_correlation(one[each], two[each]) for each in drawn], [2.5, 97.5])
    return float(low), float(high)


def correlations(outcomes: Sequence[Outcome]) -> str:
    """Returns a Markdown table of rank correlations with the healed KL, over all schedules and the better half.

    The better half has the lower KL after decomposition.
    """
    better = sorted(outcomes, key=lambda outcome: outcome.mean("decomposed"))[: (len(outcomes) + 1) // 2]
    rows: list[list[object]] = []
    for state in STATES[:-1]:
        row: list[object] = [state]
        for chosen in (outcomes, better):
            pair = [[outcome.mean(each) for outcome in chosen] for each in (state, "healed")]
            low, high = interval(pair[0], pair[1])
            row.append(f"{rank_correlation(*pair):.2f} ({low:.2f} to {high:.2f})")
        best = min(outcomes, key=lambda outcome: outcome.mean(state))
        rank = 1 + sum(other.mean("healed") < best.mean("healed") for other in outcomes)
        rows.append([*row, rank])
    header = [
        "KL when",
        f"with KL healed, {len(outcomes)} schedules",
        f"the better {len(better)}",
        "its best is healed",
    ]
    return markdown(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="use four schedules and little healing")
    parser.add_argument("--write", action="store_true", help="write the tables to results/")
    parser.add_argument("--schedules", type=int, help="number of schedules (default: 13; quick: 4)")
    parser.add_argument("--tokens", type=int, help="tokens of healing per schedule (default: 24576; quick: 2048)")
    parser.add_argument("--repair-tokens", type=int, help="tokens for repair (default: 8192; quick: 512)")
    parser.add_argument("--heldout-tokens", type=int, help="tokens of each corpus (default: 4096; quick: 512)")
    parser.add_argument("--out", help="folder for measurements and weights (default: a new temporary folder)")
    arguments = parser.parse_args()
    quick = arguments.quick
    config = Config(target_kept=KEPT, repair_tokens=arguments.repair_tokens or (512 if quick else 8192))
    experiment = Experiment.open(config)
    folder = Path(arguments.out or tempfile.mkdtemp(prefix="heal-rank-"))
    folder.mkdir(parents=True, exist_ok=True)
    options = HealingOptions(minutes=None, tokens=arguments.tokens or (2048 if quick else 24_576))
    plan = options.plan(0, experiment.device)
    table = Table(experiment, arguments.heldout_tokens or (512 if quick else 4096))
    outcomes = []
    for name, schedule in schedules(experiment.menu(), arguments.schedules or (4 if quick else 13)):
        record = folder / f"{schedule.digest[:16]}-{config.repair_tokens}-{plan.length}.json"
        if not record.exists():
            del table.rows[1:]
            with ScheduleApplier(experiment.loaded.model, experiment.store, packed=True) as applier:
                applier.apply_(schedule)
                table.score_as_is(schedule)
            with Console() as console:
                console.note(name)
                heal_experiment_(experiment, schedule, table, plan, options, folder / "weights", console)
            figures = [{corpus: row[corpus].kl for corpus in CORPORA} for row in table.rows[1:]]
            record.write_text(json.dumps(dict(zip(STATES, figures, strict=True))), encoding="utf-8")
        outcomes.append(Outcome(name, json.loads(record.read_text(encoding="utf-8"))))
    lines = [
        [outcome.name, *(f"{outcome.kl[state][corpus]:.3f}" for state in STATES for corpus in CORPORA)]
        for outcome in sorted(outcomes, key=lambda outcome: outcome.mean("healed"))
    ]
    header = ["schedule", *(f"{state}, {corpus}" for state in STATES for corpus in CORPORA)]
    counts = " and ".join(f"{workload.tokens:,} tokens of {name}" for name, workload in table.workloads.items())
    body = (
        f"SmolLM2-135M-Instruct at kept fraction {KEPT} over the sites. KL is in nats per token on {counts}. Repair "
        f"used {config.repair_tokens:,} tokens, healing {plan.tokens:,}. Ranks are those of the mean over both "
        f"corpora; intervals are 95 % bootstrap intervals over schedules.\n\n{correlations(outcomes)}\n\n"
        f"{markdown(header, lines)}"
    )
    kls = [[outcome.mean(state) for outcome in outcomes] for state in ("decomposed", "healed")]
    bars = [
        Bar("schedules", len(outcomes), ">=", 12),
        Bar("rank_correlation_before_and_after_healing", rank_correlation(*kls), ">=", 0.9),
    ]
    publish(
        "benchmarks.heal_rank",
        "Does the best schedule before healing stay the best after it?",
        body,
        bars,
        arguments.write,
    )


if __name__ == "__main__":
    main()
