"""Measures the models of a run on held-out text and report items, and repairs and heals the selected one."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path

from compression.refusal import Refusal
from compression.schedule import Schedule
from search.evaluation.latency import Latency
from search.evaluation.quality import paired_kl
from search.evaluation.score import Score
from search.experiment.experiment import Experiment
from search.healing.plan import HealingOptions
from search.healing.run import heal_experiment_, held
from search.healing.state import HEALED, REPAIRED
from search.runtime.console import Console
from search.runtime.errors import DataUnavailable
from search.runtime.memory import is_out_of_memory
from search.trials.kept_scores import KeptScores, keeping

__all__ = ["against_closed_form", "measure", "speed"]


def measure(
    experiment: Experiment,
    schedules: Mapping[str, Schedule],
    chosen: Schedule,
    folder: Path,
    kept: KeptScores,
    console: Console,
) -> tuple[dict[str, Score], Exception | None]:
    """Scores for the final table: the dense model, every schedule, and the chosen one repaired and healed.

    Repaired and healed weights are written below the run folder `folder`. If repair or healing is refused, which is
    said, or fails, the scores are those of the schedules alone, and the run can still be written.

    Args:
        kept: scores of an interrupted run, which are not measured again; receives those that are measured.

    Returns:
        The scores by row name, and the fault of ours that ended repair or healing, or None.
    """
    config, healing = experiment.config, folder / HEALED
    if not config.heal_minutes:  # weights of an earlier healing would be taken for the result
        shutil.rmtree(healing, ignore_errors=True)
    with ExitStack() as opened:
        with console.stage("measure", 1 + len(schedules), "schedules") as stage:
            evaluator = opened.enter_context(experiment.evaluator("heldout", progress=lambda: stage.advance(1)))
            scores = {"dense": evaluator.dense}
            measuring = keeping(kept, evaluator, experiment.measured_on("heldout"))
            for name, schedule in schedules.items():
                [scores[name]] = measuring.evaluate([schedule])
                stage.advance(1, f"{name}: KL {scores[name].kl:.3f}")
        untouched = not config.repair_tokens and not config.heal_minutes
        if untouched or all(choice.is_dense for _, choice in chosen):
            return scores, None
        evaluator.close()
        options = HealingOptions(minutes=config.heal_minutes)
        plan = options.plan(config.seed, experiment.device) if config.heal_minutes else None
        try:
            with held(healing) if plan else nullcontext():
                improved, healed = heal_experiment_(
                    experiment, chosen, evaluator, plan, options, healing, console, folder / REPAIRED
                )
        except (Refusal, DataUnavailable) as error:
            console.note(f"the result is not repaired and healed: {error}")
            return scores, None
        except Exception as error:
            if isinstance(error, OSError) or is_out_of_memory(error):
                raise  # the machine's, and a resumed run goes on from here
            console.note("repair or healing failed; the table and the prior are written without them")
            return scores, error
    if healed.stopped:
        console.note(f"healing stopped: {healed.stopped}")
    return {**scores, **improved}, None


def against_closed_form(scores: Mapping[str, Score], row: str) -> dict[str, object]:
    """The held-out KL of a row minus that of the closed form, paired over sequences; empty if either is not finite."""
    one, closed = scores[row].quality, scores["lagrangian"].quality
    if one.state != "ok" or closed.state != "ok":
        return {}
    return dataclasses.asdict(paired_kl(one, closed))


def speed(row: str, latencies: Mapping[str, Latency]) -> dict[str, float]:
    """Times of a row over those of the dense model. Repaired and healed models have the searched model's shapes."""
    found = latencies.get("searched" if row in ("repaired", "healed") else row)
    return {"prefill_ratio": found.prefill_ratio, "decode_ratio": found.decode_ratio} if found else {}
