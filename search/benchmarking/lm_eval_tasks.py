"""Stock tasks: lm-eval's prompts, metrics and filters over documents that were chosen here.

One of two modules that import lm-eval; knows its task interface, not its evaluator. Requests are built once and
answered by any number of models. Nothing is cached by lm-eval, whose caches are not keyed by model, and its evaluator,
which seeds the global generators anew, is not used.
"""

from __future__ import annotations

import io
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from lm_eval.api.instance import Instance

from search.benchmarking.selection import Selection
from search.reporting.frames import parquet_bytes

__all__ = ["Exam", "download"]

_SEED = 1234  # what lm-eval seeds the order of examples with


class Exam:
    """The requests of a task, ready for any number of models.

    Args:
        selection: the documents.

    Attributes:
        selection: the same.
        kind: "loglikelihood" or "generate_until": the method of a language model that answers.
        requests: lm-eval's, document by document.
    """

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        task = selection.task
        with tempfile.TemporaryDirectory(prefix="chisel-benchmark-") as folder, _quiet():
            self._task = _stock_task(task.stock, task.description, selection, Path(folder))
            self._task.set_fewshot_seed(_SEED)
            self._task.build_all_requests(rank=0, world_size=1)
        self.requests: list[Instance] = self._task.instances
        self.kind = str(self.requests[0].request_type)

    def grade(self, answer: Callable[[list[Instance]], Sequence[Any]]) -> dict[str, list[float]]:
        """Every figure of the task, document by document.

        Args:
            answer: the responses to all requests, in order.

        Returns:
            By name "acc", "acc_norm", "exact_match"; with several filters "exact_match,strict-match" and so on, and
            the first one's also by its bare name.
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
    """All rows of a data set on the hub. Raises whatever the hub's client raises."""
    with _quiet():
        return list(datasets.load_dataset(path, config, split=split))


def _stock_task(stock: str, description: str, selection: Selection, folder: Path) -> Any:
    """lm-eval's task over the documents: its own YAML, with the data in the place of its data set."""
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
    """lm-eval and datasets without progress bars and remarks; what fails still raises."""
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
