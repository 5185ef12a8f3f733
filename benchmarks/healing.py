"""What healing gives back: the default model at 94 M parameters, measured before and after on text and six benchmarks.

    python -m benchmarks.healing [--quick] [--write] [--minutes 30] [--out DIR]

The schedule is the closed-form allocation at kept 0.618; it is decomposed, repaired without training, then healed. Rows
are measured on two held-out corpora, encyclopedia articles and web pages, and on ARC-easy, PIQA, SciQ, HellaSwag, BoolQ
and MMLU with the answers' texts. The weights stay in --out; a run that was interrupted continues with the same command.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
from collections.abc import Sequence
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
from search.healing.plan import Options
from search.healing.run import heal_experiment_
from search.runtime.console import Console

KEPT = 0.618
TASKS = ("arc_easy", "piqa", "sciq", "hellaswag", "boolq", "mmlu")
CORPORA = {"web": 1, "encyclopedia": 2}
"""By place among the sources of `search.data.prose.load_prose`."""
_SHORT = 30.0
"""Minutes; a longer healing has a bar of its own and a table beside this one."""


class Table:
    """Measures the model as it stands on every corpus and task; the first row is the dense reference of all others.

    Args:
        tokens: of each corpus.
        items: of each task.
    """

    def __init__(self, experiment: Experiment, tokens: int, items: int = 0, tasks: Sequence[str] = TASKS) -> None:
        self.experiment = experiment
        encode, device = experiment.loaded.encode, experiment.device
        batch_tokens = 1 << (10 if device.type == "cpu" else 13)
        prose = load_prose()
        self.workloads: dict[str, Workload] = {}
        for name, place in CORPORA.items():
            stream = [token for text in regions(prose[place])[2] for token in encode(text + "\n\n")][:tokens]
            chunks = [stream[start : start + CHUNK_TOKENS] for start in range(0, len(stream) - 1, CHUNK_TOKENS)]
            texts = [packed_text(chunk) for chunk in chunks if len(chunk) > 1]
            self.workloads[name] = Workload(texts, device, batch_tokens)
        for task in tasks:
            chosen = stratified(load_proxy(task), items, 0)
            items_of = workload_sequences(experiment.loaded, chosen, task, "answer", [])
            self.workloads[task] = Workload(items_of, device, batch_tokens)
        self.sizes = SizeModel(experiment.loaded.model, experiment.store.sites)
        self.rows: list[dict[str, Quality]] = [
            {name: workload.reference(experiment.loaded.model) for name, workload in self.workloads.items()}
        ]
        self.dense = self._score(Schedule.dense(tuple(site.name for site in experiment.sites)))

    def score_as_is(self, schedule: Schedule) -> Score:
        """Another row."""
        model = self.experiment.loaded.model
        self.rows.append({name: workload.measure(model) for name, workload in self.workloads.items()})
        return self._score(schedule)

    def _score(self, schedule: Schedule) -> Score:
        quality = self.rows[-1]["encyclopedia"]
        return Score(quality.state, quality, self.sizes.size(schedule), 0.0)

    def accuracy(self, row: int) -> float:
        """Mean over the tasks."""
        return fmean(self.rows[row][task].accuracy for task in TASKS)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one minute of healing, few items")
    parser.add_argument("--write", action="store_true", help="keep the table in results/")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--rate", type=float, help="largest learning rate of the cores")
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--pass-tokens", type=int)
    parser.add_argument("--data", default="text", help="as of search.py heal")
    parser.add_argument("--text-tokens", type=int, help="as of search.py heal")
    parser.add_argument("--heldout-tokens", type=int, help="of each corpus")
    parser.add_argument("--items", type=int, help="of each task")
    parser.add_argument("--calibration-tokens", type=int, help="of the statistics, as of search.py")
    parser.add_argument("--repair-tokens", type=int, help="as of search.py")
    parser.add_argument("--out", help="folder that receives the weights and what a later try continues from")
    arguments = parser.parse_args()
    quick = arguments.quick
    minutes = arguments.minutes or (1.0 if quick else 30.0)
    sizes = {name: getattr(arguments, name) for name in ("calibration_tokens", "repair_tokens")}
    given = {name: value for name, value in sizes.items() if value is not None}
    config = Config.of({"target_kept": KEPT, **({"repair_tokens": 4096} if quick else {}), **given})
    experiment = Experiment.open(config)
    menu = experiment.store.menu()
    schedule = to_schedule(menu, lagrangian(menu, math.floor(KEPT * menu.dense_parameters)))
    table = Table(
        experiment, arguments.heldout_tokens or (512 if quick else 4096), arguments.items or (8 if quick else 200)
    )
    with ScheduleApplier(experiment.loaded.model, experiment.store, packed=True) as applier:
        applier.apply_(schedule)
        table.score_as_is(schedule)
        parameters = model_parameters(experiment.loaded.model)
    names = ("rate", "batch_tokens", "pass_tokens", "data", "text_tokens")
    options = Options(minutes=minutes, **{name: getattr(arguments, name) for name in names})
    plan = options.plan(0, experiment.device)
    folder = Path(arguments.out or tempfile.mkdtemp(prefix="healing-"))
    folder.mkdir(parents=True, exist_ok=True)
    with Console() as console:
        scores, healed = heal_experiment_(experiment, schedule, table, plan, options, folder, console)
    sides = ["dense", "decomposed", *list(scores)[1:]]  # what is healed is named after whether it was repaired
    lines = []
    for number, (name, row) in enumerate(zip(sides, table.rows, strict=True)):
        cells: list[object] = [name]
        for corpus in CORPORA:
            quality = row[corpus]
            cells += [f"{quality.kl:.3f}", f"{quality.perplexity:.1f}"]
        cells += [f"{row[task].accuracy:.3f}" for task in TASKS]
        lines.append([*cells, f"{table.accuracy(number):.4f}"])
    header = ["model", *(f"{corpus} {figure}" for corpus in CORPORA for figure in ("KL", "ppl")), *TASKS, "mean"]
    curve = markdown(
        ["tokens", "minutes", "KL", "perplexity"],
        [[f"{x.tokens:,}", f"{x.seconds / 60:.1f}", f"{x.kl:.3f}", f"{x.perplexity:.1f}"] for x in healed.shards],
    )
    counts = ", ".join(f"{workload.tokens:,} tokens of {name}" for name, workload in table.workloads.items())
    planned = ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(plan).items() if value is not None)
    body = (
        f"SmolLM2-135M-Instruct at {parameters:,} parameters (kept {KEPT} over the sites), {minutes:g} minutes of "
        f"healing at {healed.tokens_per_second:.0f} tokens per second, with `--data {options.data}`; statistics of "
        f"{config.calibration_tokens:,} tokens, repaired on {config.repair_tokens:,}. "
        f"Measured on {counts}. Plan: {planned}.\n\n"
        f"{markdown(header, lines)}\n\nOn the way, on search data:\n\n{curve}"
    )
    first, last = table.rows[0]["encyclopedia"], table.rows[-1]["encyclopedia"]
    gpu = experiment.device.type == "cuda"
    bars = [
        Bar("healed_kl", last.kl, "<=", 0.75),
        Bar("perplexity_over_dense", last.perplexity / first.perplexity, "<=", _allowed(minutes, gpu)),
        Bar("accuracy_over_dense", table.accuracy(-1) / table.accuracy(0), ">=", 0.97 if gpu else 0.93),
    ]
    variant = "" if minutes <= _SHORT else f"{minutes:g}-minutes"
    publish("benchmarks.healing", "What healing gives back", body, bars, arguments.write, variant)
    print(f"weights: {folder}")


def _allowed(minutes: float, gpu: bool) -> float:
    """Largest perplexity over dense that is asked for."""
    return 1.2 if gpu else 1.8 if minutes <= _SHORT else 1.42


if __name__ == "__main__":
    main()
