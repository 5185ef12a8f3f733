"""Parity with lm-eval, item by item: the same prompts as its stock tasks, the same log-likelihoods as its HFLM."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import pytest
from fake_data import ARC_ROWS, HELLASWAG_ROWS, PIQA_ROWS, SCIQ_ROWS, fake_data, mmlu_rows
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tiny_model import with_beginning

from search.data.datasets import load_proxy
from search.data.items import Item
from search.data.prompts import Prompt, render
from search.evaluation.workload import loglikelihoods
from search.experiment.experiment import workload_sequences
from search.model.loading import load_model

__all__ = ["fake_data"]

CASES: dict[str, tuple[str, str, Sequence[Mapping[str, Any]]]] = {
    "mmlu/default/mmlu_high_school_us_history": ("mmlu", "letter", mmlu_rows("high_school_us_history", "test", 40)),
    "mmlu/continuation/mmlu_high_school_us_history": (
        "mmlu",
        "answer",
        mmlu_rows("high_school_us_history", "test", 40),
    ),
    "arc/arc_easy": ("arc_easy", "answer", ARC_ROWS),
    "sciq/sciq": ("sciq", "answer", SCIQ_ROWS),
    "piqa/piqa": ("piqa", "answer", PIQA_ROWS),
    "hellaswag/hellaswag": ("hellaswag", "answer", HELLASWAG_ROWS),
}


def lm_eval_instances(stock: str, rows: Sequence[Mapping[str, Any]], folder: Path) -> list[list[Any]]:
    """The instances that lm-eval's stock task makes of these rows, item by item."""
    home = Path(lm_eval.tasks.__file__).parent
    datasets.Dataset.from_list([dict(row) for row in rows]).to_parquet(folder / "rows.parquet")
    files = dict.fromkeys(("train", "dev", "validation", "test"), str(folder / "rows.parquet"))
    own = {
        "include": f"{home / stock}.yaml",
        "task": "own",
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
    }
    (folder / "own.yaml").write_text(json.dumps(own))
    task = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False).load("own")["tasks"]["own"]
    task.build_all_requests(rank=0, world_size=1)
    grouped: dict[int, list[Any]] = {}
    for instance in task.instances:
        grouped.setdefault(instance.doc_id, []).append(instance)
    return [sorted(grouped[number], key=lambda instance: instance.idx) for number in sorted(grouped)]


def lm_eval_loglikelihoods(model: Any, tokenizer: Any, requests: Sequence[Prompt]) -> list[list[float]]:
    """Summed log-probability of each continuation by lm-eval's HFLM, nats."""
    instances = [
        Instance("loglikelihood", {}, (request.context, continuation), index)
        for request in requests
        for index, continuation in enumerate(request.continuations)
    ]
    results = iter(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4).loglikelihood(instances))
    return [[next(results)[0] for _ in request.continuations] for request in requests]


@pytest.mark.parametrize("stock", CASES)
@pytest.mark.usefixtures("fake_data")
def test_prompts_equal_the_stock_tasks(stock: str, tmp_path: Path) -> None:
    proxy, form, rows = CASES[stock]
    items: Sequence[Item] = [item for item in load_proxy(proxy) if item.subject in ("", rows[0].get("subject"))]
    theirs = lm_eval_instances(stock, rows, tmp_path)
    assert len(items) == len(theirs) == len(rows)
    for item, instances in zip(items, theirs, strict=True):
        request = render(item, proxy, form)
        pairs = [(request.context, continuation) for continuation in request.continuations]
        assert pairs == [instance.args for instance in instances]


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("name", ["random:tiny-llama", "random:tiny-gpt2", "random:tiny-qwen2"])
@pytest.mark.parametrize(("proxy", "form"), [("mmlu", "letter"), ("mmlu", "answer"), ("hellaswag", "answer")])
@pytest.mark.usefixtures("fake_data")
def test_loglikelihoods_of_a_run_equal_those_of_lm_eval(name: str, proxy: str, form: str, begun: bool) -> None:
    loaded = load_model(name, "cpu")
    if begun:
        with_beginning(loaded)
    items = load_proxy(proxy)[:5]
    theirs = lm_eval_loglikelihoods(loaded.model, loaded.tokenizer, [render(item, proxy, form) for item in items])
    ours = loglikelihoods(loaded.model, workload_sequences(loaded, items, proxy, form, []))
    for mine, reference in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(reference, rel=1e-4, abs=1e-3)
