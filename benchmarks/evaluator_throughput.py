"""Measures trials per minute of real evaluators on one machine, in this process and in processes of their own.

    python -m benchmarks.evaluator_throughput [--quick] [--write] [--model NAME] [--counts 1 2] [--trials N]

The processors are divided among the evaluators. All configurations score the same random schedules and take turns. The
clock runs from the moment when every evaluator has scored one schedule until the last score is back; the start-up time
is reported separately.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from statistics import median

import numpy as np
import torch

from benchmarks.report import markdown, publish
from compression.schedule import Schedule
from envs import Problem
from search.config import Config
from search.evaluation.pool import Job
from search.experiment.experiment import Experiment
from search.experiment.open_model import open_model
from search.model.devices import resolve_device
from search.workers.pools import search_pool

IN_PROCESS = 0


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="run few trials and one round")
    parser.add_argument("--write", action="store_true", help="write the table to results/")
    parser.add_argument("--model", default="default", help="model, as for search.py")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2], help="numbers of evaluators (default: 1 2)")
    parser.add_argument("--trials", type=int, help="schedules per configuration and round (default: 12; quick: 4)")
    parser.add_argument("--rounds", type=int, help="rounds (default: 2; quick: 1)")
    given = parser.parse_args()
    trials, rounds = given.trials or (4 if given.quick else 12), given.rounds or (1 if given.quick else 2)
    config = Config.of({"model": given.model})
    device = resolve_device(config.device)
    loaded, sites = open_model(config, device)
    menu = Experiment.of(config, loaded, sites, device).menu()
    problem = Problem.build(menu, config.target_kept, config.granularity)
    generator = np.random.default_rng(0)
    episodes = problem.middle + generator.integers(-2, 3, (trials, problem.steps))
    schedules = [problem.schedule(episode) for episode in episodes]
    cores = len(os.sched_getaffinity(0))
    sides = [IN_PROCESS, *given.counts]
    taken: dict[int, list[tuple[float, float]]] = {count: [] for count in sides}
    for _ in range(rounds):
        for count in sides:
            threads = max(1, cores // max(1, count))
            torch.set_num_threads(threads)
            wanted = {} if count == IN_PROCESS else {"evaluators": count, "threads": threads}
            experiment = Experiment.of(config.model_copy(update=wanted), loaded, sites, device)
            taken[count].append(measured(experiment, problem.closed_form(), schedules, max(1, count)))
            print(count, *(f"{value:.1f}" for value in taken[count][-1]), flush=True)
    rows = []
    for count in sides:
        starts, scored = zip(*taken[count], strict=True)
        ratio = median(base / own for (_, base), own in zip(taken[IN_PROCESS], scored, strict=True))
        name = "in this process" if count == IN_PROCESS else f"{count} of their own"
        speed, start = f"{60 * trials / median(scored):.1f}", f"{median(starts):.0f}"
        rows.append((name, cores // max(1, count), speed, f"{ratio:.2f}", start))
    body = f"Scoring {trials} schedules of {loaded.model_id} in {rounds} rounds on {cores} cores:\n\n" + markdown(
        ("evaluators", "threads each", "trials a minute", "times", "seconds to start"), rows
    )
    publish("benchmarks.evaluator_throughput", "Throughput of real evaluators", body, [], given.write)


def measured(
    experiment: Experiment, anchor: Schedule, schedules: Sequence[Schedule], count: int
) -> tuple[float, float]:
    """Returns the seconds until all evaluators have scored once, and the seconds that the schedules take after that."""
    start = time.perf_counter()
    with search_pool(experiment, anchor, print) as pool:
        warm = [anchor] * count
        for number, schedule in enumerate(warm):
            pool.submit(number, Job(schedule))
        for _ in warm:
            pool.finished()
        begun = time.perf_counter()
        for number, schedule in enumerate(schedules, len(warm)):
            pool.submit(number, Job(schedule))
        for _ in schedules:
            pool.finished()
        return begun - start, time.perf_counter() - begun


if __name__ == "__main__":
    main()
