"""Apply the prompts, metrics and filters of stock lm-eval tasks to documents selected by this project.

Knows the task interface of lm-eval. Requests are built once and answered by any number of models. The evaluator of
lm-eval is not used, because it reseeds the global random generators; its caches are not used, because their keys omit
the model. Only this module and `search.benchmarking.lm_eval_model` import lm-eval.
"""

from __future__ import annotations

import io
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval.api.instance import Instance

from compression.storage.temporary_names import temporary_folder
from search.benchmarking.selection import Selection
from search.reporting.frames import parquet_bytes

__all__ = ["Exam", "download"]

_SEED = 1234  # lm-eval's seed for the order of few-shot examples


class Exam:
    """The requests of a task, which any number of models can answer.

    Args:
        selection: the task and its documents.

    Attributes:
        selection: as given.
        kind: name of the language model's method that answers the requests, "loglikelihood" or "generate_until".
        requests: the lm-eval requests, document by document.
    """

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        task = selection.task
        with temporary_folder(Path(tempfile.gettempdir()), "chisel.benchmark") as folder, _quiet():
            self._task = _stock_task(task.stock, task.description, selection, folder)
            self._task.set_fewshot_seed(_SEED)
            self._task.build_all_requests(rank=0, world_size=1)
        self.requests: list[Instance] = self._task.instances
        self.kind = str(self.requests[0].request_type)

    def grade(self, answer: Callable[[list[Instance]], Sequence[Any]]) -> dict[str, list[float]]:
        """Compute every metric of the task for every document.

        Args:
            answer: returns the responses to all requests, in order.

        Returns:
            One value per document by metric, such as "acc", "acc_norm" or "exact_match". If the task has several
            filters, the names include the filter, as in "exact_match,strict-match"; the values of the first filter
            are also given under the bare name of the metric.
        """
        responses = answer(self.requests)
        for request, response in zip(self.requests, responses, strict=True):
            request.resps, request.filtered_resps = [response], {}
        with _quiet():
            self._task.apply_filters()
        of_document: dict[int, list[Instance]] = {}
        for request in self.requests:
            of_document.setdefault(request.doc_id, []).append(request)
        figures: dict[str, list[float]] = {}
        filters = list(self.requests[0].filtered_resps)
        for number in sorted(of_document):
            instances = sorted(of_document[number], key=lambda instance: instance.idx)
            for place, name in enumerate(filters):
                filtered = [instance.filtered_resps[name] for instance in instances]
                for metric, value in self._task.process_results(instances[0].doc, filtered).items():
                    if len(filters) > 1:
                        figures.setdefault(f"{metric},{name}", []).append(float(value))
                    if place == 0:
                        figures.setdefault(metric, []).append(float(value))
        return figures


def download(path: str, config: str | None, split: str) -> list[Mapping[str, Any]]:
    """All rows of a data set on the hub; passes on every exception of the hub client."""
    with _quiet():
        return list(datasets.load_dataset(path, config, split=split))


def _stock_task(stock: str, description: str, selection: Selection, folder: Path) -> Any:
    """The lm-eval task built from its stock YAML, with our documents instead of its data set."""
    rows = [dict(document.row) for document in selection.documents]
    (folder / "rows.parquet").write_bytes(parquet_bytes(rows))
    name = f"chisel_{selection.task.name}"
    yaml: dict[str, Any] = {
        "include": str(Path(lm_eval.tasks.__file__).parent / stock),
        "task": name,
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": dict.fromkeys(("train", "dev", "validation", "test"), str(folder / "rows.parquet")),
            "cache_dir": str(folder / "cache"),
        },
    }
    if description:
        yaml["description"] = description
    (folder / f"{name}.yaml").write_text(json.dumps(yaml), encoding="utf-8")
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    return manager.load(name)["tasks"][name]


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress progress bars and messages of lm-eval and datasets; exceptions still propagate."""
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
