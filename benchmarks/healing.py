"""Measures the default model at 94 M parameters before and after healing, on text and six benchmarks.

    python -m benchmarks.healing [--quick] [--write] [--minutes 30] [--prior FILE] [--out DIR]

The schedule is that of a prior, or the closed-form allocation at kept fraction 0.618. The model is decomposed, repaired
without training, and then healed. Each state is measured on two held-out corpora, encyclopedia articles and web pages;
the dense model and the stored healed weights also on ARC-easy, PIQA, SciQ, HellaSwag, BoolQ and MMLU with the answers'
texts. The weights stay in --out; the same command continues an interrupted run.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from benchmarks.report import Bar, markdown, publish
from compression import Schedule, ScheduleApplier, lagrangian, to_schedule
from compression.sites import model_parameters
from compression.size import SizeModel
from search.config import Config
from search.data.datasets import load_proxy
from search.data.items import stratified
from search.data.prose import load_prose, regions
from search.evaluation.packed_sequences import packed_text
from search.evaluation.quality import Quality
from search.evaluation.score import Score
from search.evaluation.workload import Workload
from search.experiment.calibration import CHUNK_TOKENS
from search.experiment.experiment import Experiment, workload_sequences
from search.healing.plan import HealingOptions
from search.healing.run import heal_experiment_
from search.healing.state import REPAIRED, StoredWeights
from search.priors.format import Prior
from search.priors.same_model import refuse_other_model
from search.runtime.console import Console

KEPT = 0.618
TASKS = ("arc_easy", "piqa", "sciq", "hellaswag", "boolq", "mmlu")
CORPORA = {"web": 1, "encyclopedia": 2}
"""Corpora with their index among the sources of `search.data.prose.load_prose`."""
_SHORT = 30.0
"""Minutes; longer healing has another bar and a separate table."""


class Table:
    """Measures the model's current state on every corpus; the first row is the dense reference of all others.

    Args:
        experiment: the experiment whose model is measured; the model must be dense at first.
        tokens: tokens of each corpus.
    """

    def __init__(self, experiment: Experiment, tokens: int) -> None:
        self.experiment = experiment
        loaded, device = experiment.loaded, experiment.device
        room = CHUNK_TOKENS - len(loaded.beginning)
        batch_tokens = 1 << (10 if device.type == "cpu" else 13)
        prose = load_prose()
        self.workloads: dict[str, Workload] = {}
        for name, place in CORPORA.items():
            stream = [token for text in regions(prose[place])[2] for token in loaded.encode(text + "\n\n")][:tokens]
            pieces = [stream[start : start + room] for start in range(0, len(stream) - 1, room)]
            texts = [packed_text([*loaded.beginning, *piece]) for piece in pieces if len(piece) > 1]
            self.workloads[name] = Workload(texts, experiment.loaded.model, batch_tokens)
        self.sizes = SizeModel(experiment.loaded.model, experiment.store.sites)
        self.rows: list[dict[str, Quality]] = [
            {name: workload.reference(experiment.loaded.model) for name, workload in self.workloads.items()}
        ]
        self.dense = self._score(Schedule.dense(tuple(site.name for site in experiment.sites)))

    def score_as_is(self, schedule: Schedule) -> Score:
        """Measures the current state of the model as another row and returns its score."""
        model = self.experiment.loaded.model
        self.rows.append({name: workload.measure(model) for name, workload in self.workloads.items()})
        return self._score(schedule)

    def _score(self, schedule: Schedule) -> Score:
        quality = self.rows[-1]["encyclopedia"]
        return Score(quality.state, quality, self.sizes.size(schedule), 0.0)


def answers(experiment: Experiment, items: int, healed: Path, schedule: Schedule) -> list[dict[str, Quality]]:
    """Measures the dense model and the healed weights stored in a folder on every task; the model is dense after it.

    Args:
        items: items of each task.
    """
    loaded = experiment.loaded
    batch_tokens = 1 << (10 if experiment.device.type == "cpu" else 13)
    workloads = {}
    for task in TASKS:
        sequences = workload_sequences(loaded, stratified(load_proxy(task), items, 0), task, "answer", [])
        workloads[task] = Workload(sequences, loaded.model, batch_tokens)
    rows = [{task: workload.reference(loaded.model) for task, workload in workloads.items()}]
    undo = StoredWeights.read(healed).put_(loaded.model, experiment.sites, schedule)
    rows.append({task: workload.measure(loaded.model) for task, workload in workloads.items()})
    undo()
    return rows


def accuracy(row: Mapping[str, Quality]) -> tuple[float, float]:
    """Mean accuracy over the tasks and its standard error."""
    errors = [quality.accuracy_standard_error for quality in row.values()]
    return fmean(quality.accuracy for quality in row.values()), math.hypot(*errors) / len(errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="heal for one minute and use few items")
    parser.add_argument("--write", action="store_true", help="write the tables to results/")
    parser.add_argument("--minutes", type=float, help="minutes of healing (default: 30; quick: 1)")
    parser.add_argument("--prior", type=Path, help="prior with the schedule (default: the closed form)")
    parser.add_argument("--rate", type=float, help="largest learning rate of the cores")
    parser.add_argument("--batch-tokens", type=int, help="as for search.py heal")
    parser.add_argument("--pass-tokens", type=int, help="as for search.py heal")
    parser.add_argument("--data", default="text", help="as for search.py heal (default: text)")
    parser.add_argument("--text-tokens", type=int, help="as for search.py heal")
    parser.add_argument("--heldout-tokens", type=int, help="tokens of each corpus (default: 4096; quick: 512)")
    parser.add_argument("--items", type=int, help="items of each task (default: 200; quick: 8)")
    parser.add_argument("--calibration-tokens", type=int, help="calibration tokens, as for search.py")
    parser.add_argument("--repair-tokens", type=int, help="as for search.py")
    parser.add_argument("--out", help="folder for weights and training state (default: a new temporary folder)")
    arguments = parser.parse_args()
    quick = arguments.quick
    minutes = arguments.minutes or (1.0 if quick else 30.0)
    sizes = {name: getattr(arguments, name) for name in ("calibration_tokens", "repair_tokens")}
    given = {name: value for name, value in sizes.items() if value is not None}
    config = Config.of({"target_kept": KEPT, **({"repair_tokens": 4096} if quick else {}), **given})
    experiment = Experiment.open(config)
    schedule, source = _schedule(experiment, arguments.prior)
    table = Table(experiment, arguments.heldout_tokens or (512 if quick else 4096))
    with ScheduleApplier(experiment.loaded.model, experiment.store, packed=True) as applier:
        applier.apply_(schedule)
        table.score_as_is(schedule)
        parameters = model_parameters(experiment.loaded.model)
    names = ("rate", "batch_tokens", "pass_tokens", "data", "text_tokens")
    options = HealingOptions(minutes=minutes, **{name: getattr(arguments, name) for name in names})
    plan = options.plan(0, experiment.device)
    folder = Path(arguments.out or tempfile.mkdtemp(prefix="healing-"))
    folder.mkdir(parents=True, exist_ok=True)
    with Console() as console:
        repaired = arguments.prior.parent / REPAIRED if arguments.prior else None  # of the run that holds the prior
        settings = (experiment, schedule, table, plan, options, folder, console, repaired)
        scores, healed = heal_experiment_(*settings, keep=False)
    answered = answers(experiment, arguments.items or (8 if quick else 200), folder, schedule)
    sides = ["dense", "decomposed", *list(scores)[1:]]  # the names of the other rows tell whether repair was kept
    lines = []
    for name, row in zip(sides, table.rows, strict=True):
        cells: list[object] = [name]
        for corpus in CORPORA:
            quality = row[corpus]
            cells += [f"{quality.kl:.3f}", f"{quality.perplexity:.1f}"]
        lines.append(cells)
    header = ["model", *(f"{corpus} {figure}" for corpus in CORPORA for figure in ("KL", "perplexity"))]
    scored = markdown(
        ["model", *TASKS, "mean accuracy ± standard error"],
        [
            [name, *(f"{row[task].accuracy:.3f}" for task in TASKS), "{:.4f} ± {:.4f}".format(*accuracy(row))]
            for name, row in zip(("dense", "healed"), answered, strict=True)
        ],
    )
    curve = markdown(
        ["tokens", "minutes", "KL", "perplexity"],
        [[f"{x.tokens:,}", f"{x.seconds / 60:.1f}", f"{x.kl:.3f}", f"{x.perplexity:.1f}"] for x in healed.measurements],
    )
    counts = ", ".join(f"{workload.tokens:,} tokens of {name}" for name, workload in table.workloads.items())
    counts += "".join(f", {quality.items:,} items of {name}" for name, quality in answered[0].items())
    planned = ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(plan).items() if value is not None)
    body = (
        f"SmolLM2-135M-Instruct at {parameters:,} parameters, with {source}, healed for {minutes:g} minutes at "
        f"{healed.tokens_per_second:.0f} tokens per second with `--data {options.data}`. The calibration statistics "
        f"use {config.calibration_tokens:,} tokens, repair {config.repair_tokens:,}. "
        f"Measured on {counts}. Plan: {planned}.\n\n"
        f"{markdown(header, lines)}\n\n{scored}\n\nCourse of the healing, measured on search data:\n\n{curve}"
    )
    gpu = experiment.device.type == "cuda"
    bars = [
        Bar(
            f"{corpus}_perplexity_over_dense",
            table.rows[-1][corpus].perplexity / table.rows[0][corpus].perplexity,
            "<=",
            _allowed(corpus, minutes, gpu),
        )
        for corpus in CORPORA
    ]
    (before, _), (after, _) = (accuracy(row) for row in answered)
    bars.append(Bar("accuracy_over_dense", after / before, ">=", 0.98 if gpu else 0.97))
    variant = "" if minutes <= _SHORT else f"{minutes:g}-minutes"
    publish("benchmarks.healing", "Quality before and after healing", body, bars, arguments.write, variant)
    print(f"weights: {folder}")


def _schedule(experiment: Experiment, prior: Path | None) -> tuple[Schedule, str]:
    """The schedule of the prior, or of the closed form, and what it is in words."""
    if prior is None:
        menu = experiment.menu()
        schedule = to_schedule(menu, lagrangian(menu, math.floor(KEPT * menu.dense_parameters)))
        return schedule, f"the closed form at kept fraction {KEPT} over the sites"
    read = Prior.read(prior)
    refuse_other_model(read, experiment.loaded, prior, print)
    return read.schedule, f"the schedule of `{prior.name}` (kept fraction {read.kept_fraction:.3f} over the sites)"


def _allowed(corpus: str, minutes: float, gpu: bool) -> float:
    """Bar for the healed perplexity, as a multiple of the dense model's."""
    if gpu:
        return 1.15
    return 1.18 if minutes > _SHORT else 1.25 if corpus == "encyclopedia" else 1.3


if __name__ == "__main__":
    main()
