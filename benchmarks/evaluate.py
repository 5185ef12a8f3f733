"""Compares schedules scored per second on the default model by the literature's method, by swapping, and by Chisel.

    python -m benchmarks.evaluate [--quick] [--write]

The three sides run in one process and alternate over the same schedules. All schedules use plain low rank, so that
every side makes the same decomposition. `--quick` uses fewer schedules, runs the naive side once, and measures no
memory.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.evaluator_sides import SIDES, Figures, Naive, Ours, Work, plain_store
from benchmarks.memory import peak_resident
from benchmarks.report import Bar, markdown, publish
from compression.numerics.legs import resolve
from compression.schedule import Choice, Schedule
from compression.sites import Site
from envs import Problem
from search.config import Config
from search.data.prompts import render
from search.evaluation.evaluator import REUSE_BYTES, ModelEvaluator
from search.evaluation.quality import paired_kl
from search.evaluation.workload import Workload
from search.experiment.experiment import Experiment
from search.experiment.open_model import open_model
from search.model.devices import resolve_device

MODULE = "benchmarks.evaluate"
KEPT = 0.8
TOLERANCE = 1e-3  # relative, for KL and for a choice's log-probability
ROUNDS = 4  # rounds into which the schedules of a stream are divided, in order; figures are medians over rounds


@dataclass(frozen=True)
class Timing:
    """Timings of one stream of schedules.

    Attributes:
        naive: seconds of one schedule by the naive side; NaN if it was not run.
        seconds: seconds of every schedule by each of the other sides.
        skipped: fraction of blocks that Chisel did not need to run.
    """

    naive: float
    seconds: dict[str, list[float]]
    skipped: float

    def median(self, side: str) -> float:
        """Median over rounds of a side's mean seconds per schedule."""
        values = self.seconds[side]
        size = len(values) // ROUNDS
        return statistics.median(statistics.fmean(values[at : at + size]) for at in range(0, len(values), size))


@dataclass(frozen=True)
class Race:
    """Selection among finalists without (False) and with (True) early stopping.

    Attributes:
        seconds: seconds taken.
        tokens: tokens scored.
        same: whether both find the same best schedule.
        given_up: finalists whose evaluation was stopped early.
        count: number of finalists.
    """

    seconds: dict[bool, float]
    tokens: dict[bool, int]
    same: bool
    given_up: int
    count: int


def local_walk(sites: Sequence[Site], base: Schedule, count: int, seed: int) -> list[Schedule]:
    """Makes schedules as evolution, coordinate and sensitivity searches propose them: one or two blocks change.

    Starting from an incumbent schedule, each step lowers χ by a quarter at the compressed sites of one block; every
    second step also raises χ by a quarter in another block. Blocks are drawn uniformly among those with a compressed
    site. Every fourth step becomes the incumbent. All schedules are different.
    """
    generator, found, incumbent = random.Random(seed), {base.digest: base}, base
    blocks = sorted({site.block for site in sites if not base[site.name].is_dense})

    def changed(site: Site, factors: dict[int, float]) -> Choice:
        choice = incumbent[site.name]
        if choice.is_dense or site.block not in factors:
            return choice
        largest = resolve(choice.topology, site.out_features, site.in_features).break_even_chi
        chi = min(largest, max(1, round(choice.chi * factors[site.block])))
        return Choice(choice.topology, chi, choice.metric)

    while len(found) <= count:
        factors = dict(zip(generator.sample(blocks, 1 + len(found) % 2), (0.75, 1.25), strict=False))
        step = Schedule(tuple((site.name, changed(site, factors)) for site in sites))
        found.setdefault(step.digest, step)
        incumbent = step if len(found) % 4 == 0 else incumbent
    return list(found.values())[1:]


def global_draws(problem: Problem, count: int, seed: int, reach: int = 4) -> list[Schedule]:
    """Makes schedules as REINFORCE proposes them: random levels up to `reach` from the middle; every block changes."""
    generator = random.Random(seed)
    levels = range(problem.middle - reach, problem.middle + reach + 1)
    return [problem.schedule([generator.choice(levels) for _ in range(problem.steps)]) for _ in range(count)]


def alternate(sides: dict[str, Callable[[Schedule], Figures]], schedules: Sequence[Schedule]) -> dict[str, list[float]]:
    """Returns the seconds of each side for each schedule, and checks that the scores are equal.

    The sides run in reverse order for every second schedule.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number, schedule in enumerate(schedules):
        kl = {}
        for name in list(sides)[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            kl[name] = sides[name](schedule).kl
            seconds[name].append(time.perf_counter() - start)
        first, second = kl.values()
        assert abs(first - second) <= TOLERANCE * first, kl
        print(number, {name: round(values[-1], 2) for name, values in seconds.items()}, kl, flush=True)
    return seconds


def finalists(experiment: Experiment, problem: Problem, count: int) -> Race:
    """Selects among draws near to and far from the closed form, without and with early stopping.

    Hidden states of one selection are not reused in the other.
    """
    [sequences] = experiment.shards("selection")
    workload = Workload(sequences, experiment.loaded.model, 512, mixed=True)
    store = plain_store(experiment.loaded, experiment.sites)
    evaluator = ModelEvaluator(experiment.loaded.model, store, [workload])
    schedules = [s for reach in (1, 4, 7) for s in global_draws(problem, -(-count // 3), reach, reach)]
    seconds, tokens, best, given_up = {}, {}, {}, 0
    for racing in (False, True):
        evaluator.states.forget()
        start = time.perf_counter()
        [incumbent] = evaluator.evaluate([problem.closed_form()])
        tokens[racing] = incumbent.quality.tokens
        for schedule in schedules:
            [score] = evaluator.evaluate([schedule], incumbent if racing else None)
            tokens[racing] += score.quality.tokens
            given_up += score.state == "raced"
            if score.state == "ok" and paired_kl(score.quality, incumbent.quality).value < 0:
                incumbent = score
        seconds[racing], best[racing] = time.perf_counter() - start, incumbent.quality.kl
    evaluator.close()
    return Race(seconds, tokens, best[False] == best[True], given_up, len(schedules))


def peak_memory(side: str, work: Work, schedules: Sequence[Schedule]) -> float:
    """Peak resident memory, in GB, of a process that only scores these schedules by one side."""
    with tempfile.TemporaryDirectory() as temporary:
        task = Path(temporary) / "task.json"
        task.write_text(json.dumps({"work": work.to_json(), "schedules": [s.to_json() for s in schedules]}))
        command = [sys.executable, "-m", MODULE, "--alone", side, str(task)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(result.stdout.split()[-1]) / 1e9


def alone(side: str, task: Path) -> None:
    """Scores schedules by one side only and prints the peak resident memory of this process, in bytes."""
    row = json.loads(task.read_text())
    score = SIDES[side](Work.from_json(row["work"]), task.parent)
    for schedule in row["schedules"]:
        score(Schedule.from_json(schedule))
    print(peak_resident())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="use fewer schedules and measure no memory")
    parser.add_argument("--write", action="store_true", help="write the tables to results/")
    parser.add_argument("--alone", nargs=2, metavar=("SIDE", "TASK"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        alone(arguments.alone[0], Path(arguments.alone[1]))
        return
    local, far, candidates = (4, 4, 3) if arguments.quick else (8, 8, 4)

    config, device = Config.of({"device": "cpu", "form": "factors"}), resolve_device("cpu")
    loaded, sites = open_model(config, device)
    experiment = Experiment.of(config, loaded, sites, device)
    dealt = len(experiment.shards("search")) + 4
    requests = [render(item) for item in experiment.splits.search_items[0::dealt]]
    items = tuple((one.context, tuple(one.continuations), one.answer) for one in requests)
    work = Work(items, experiment.splits.search_text.chunks[0::dealt])
    problem = Problem.build(plain_store(loaded, sites).menu("plain"), KEPT, "block+family")
    streams = {
        "local": local_walk(sites, problem.closed_form(), local, 1),
        "global": global_draws(problem, far, 2),
    }

    with tempfile.TemporaryDirectory() as temporary:
        naive, swapping, ours = (SIDES[name](work, Path(temporary)) for name in SIDES)
        assert isinstance(naive, Naive)
        assert isinstance(ours, Ours)
        states, tokens = ours.evaluator.states, (ours.workload.tokens, ours.workload.padded_tokens)
        sides = {"swapping": swapping, "ours": ours}
        alternate(sides, [problem.closed_form()])  # warms up all sides on the start of the walk
        timings = {}
        for stream, schedules in streams.items():
            before = states.blocks_skipped, states.blocks_run
            seconds = alternate(sides, schedules)
            skipped, run = states.blocks_skipped - before[0], states.blocks_run - before[1]
            naively = math.nan
            if stream == "global" or not arguments.quick:
                start = time.perf_counter()
                theirs = naive(schedules[-1]).choices
                naively = time.perf_counter() - start
                equal(theirs, swapping(schedules[-1]).choices, ours.choices())
            timings[stream] = Timing(naively, seconds, skipped / (skipped + run))
        ours.evaluator.close()
    parts = naive.seconds
    del naive, swapping, ours, sides, states
    race = finalists(experiment, problem, candidates)
    counted = {"naive": streams["global"][:1], "swapping": streams["global"][:1], "ours": streams["local"]}
    memory = {} if arguments.quick else {side: peak_memory(side, work, some) for side, some in counted.items()}
    body, bars = page(timings, parts, race, memory, work, tokens, streams)
    publish(MODULE, "Evaluator speed", body, bars, arguments.write)


def equal(*sides: Sequence[Sequence[float]]) -> None:
    """Checks that the sides agree on log-probabilities within the tolerance and on each item's likeliest choice."""
    for other in sides[1:]:
        for one, two in zip(sides[0], other, strict=True):
            assert all(abs(x - y) <= TOLERANCE * abs(x) for x, y in zip(one, two, strict=True)), (one, two)
    assert len({Figures(0.0, tuple(map(tuple, side))).likeliest for side in sides}) == 1


def page(
    timings: dict[str, Timing],
    parts: dict[str, float],
    race: Race,
    memory: dict[str, float],
    work: Work,
    tokens: tuple[int, int],
    streams: dict[str, list[Schedule]],
) -> tuple[str, list[Bar]]:
    """Returns the report and its bars; `parts` are the seconds of the parts of the naive side."""
    names = {
        "local": "local: one or two blocks change",
        "global": "global: every block changes",
        "both": "both, equal parts",
    }
    naively = [timing.naive for timing in timings.values() if not math.isnan(timing.naive)]
    naive = statistics.median(naively)
    seconds = {stream: (timing.median("swapping"), timing.median("ours")) for stream, timing in timings.items()}
    seconds["both"] = tuple(map(statistics.fmean, zip(*seconds.values(), strict=True)))
    ratio = {stream: swapping / ours for stream, (swapping, ours) in seconds.items()}
    skipped = {stream: timing.skipped for stream, timing in timings.items()}
    rows = [
        (
            names[stream],
            *(f"{1 / each:.3f}" for each in (naive, swapping, ours)),
            f"{naive / ours:.0f}",
            f"{ratio[stream]:.2f}",
            f"{skipped.get(stream, statistics.fmean(skipped.values())):.0%}",
        )
        for stream, (swapping, ours) in seconds.items()
    ]
    header = ["schedules per second", "(a)", "(b)", "(c)", "(c) / (a)", "(c) / (b)", "blocks that (c) skips"]
    racing = [
        (name, f"{race.seconds[on]:.1f}", race.tokens[on], race.given_up if on else 0)
        for on, name in ((False, "all measured in full"), (True, "racing"))
    ]
    bars = [
        Bar("c_over_a", naive / seconds["both"][1], ">=", 20),
        Bar("c_over_b", ratio["both"], ">=", 3),
    ]
    count = {stream: len(timing.seconds["ours"]) for stream, timing in timings.items()}
    missed = "".join(
        f" On the {stream} stream alone, (c) is less than 3 times as fast as (b)."
        for stream in timings
        if ratio[stream] < 3
    )
    winner = "the same winner" if race.same else "different winners"
    bf16 = "has" if torch.cpu._is_avx512_bf16_supported() else "lacks"
    peaks = ", ".join(f"({letter}) {gb:.2f} GB" for letter, gb in zip("abc", memory.values(), strict=bool(memory)))
    sizes = [sum(not choice.is_dense for _, choice in schedule) for stream in streams.values() for schedule in stream]
    body = f"""Each schedule is scored on {work.describe()}. The kept fraction is {KEPT} with plain low rank;
{min(sizes)} to {max(sizes)} of {len(streams["local"][0].choices)} sites are compressed.{missed}

{markdown(header, rows)}

* (a) loads the model ({parts["load"]:.1f} s), decomposes every site by `torch.linalg.svd` ({parts["decompose"]:.1f} s),
  inserts the factors and calls `lm_eval.evaluate` on the items and the text ({parts["lm-eval"]:.1f} s). Its speed is
  the median of {len(naively)} schedules; the seconds of the parts are those of the last.
* (b) gives every site a new module from cached factors. Every choice is a separate padded row with its whole context;
  logits and log-probabilities are computed at all positions, and nothing is reused.
* (c) is `ModelEvaluator` with {tokens[0]:,} tokens per schedule ({tokens[1]:,} with padding).
* (b) and (c) alternate over {count["local"]} local and {count["global"]} global schedules in one process. Their speeds
  are medians over {ROUNDS} rounds of each stream. The bars weigh both streams equally.
* The scores are equal: the KL of (b) and (c) agrees within a relative {TOLERANCE:g} for every schedule, and for every
  schedule of (a) the log-probabilities of all choices agree equally well among (a), (b) and (c), with the same
  likeliest choices.
* All sides compute in float32; (c) would use bf16 on hardware with bf16 multiplication, which this machine {bf16}.

(c) selects among the closed form and {race.count} finalists on the selection set, with and without early stopping
("racing"); both find {winner}:

{markdown(["finalists", "seconds", "tokens scored", "given up"], racing)}

Peak resident memory of a process that scores by one side only: {peaks or "not measured by --quick"}.
Of this, (c) may use {REUSE_BYTES // 2**20} MiB for hidden states.
"""
    return body, bars


if __name__ == "__main__":
    main()
