"""Parity of the benchmarks with lm-eval's own evaluator and model, item by item, on the same rows."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.tasks
import pytest
import torch
from fake_data import fake_data
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tiny_gpt2 import tiny_gpt2
from tiny_model import with_beginning

from compression.refusal import Refusal
from search.benchmarking.documents import select
from search.benchmarking.lm_eval_model import LanguageModel
from search.benchmarking.lm_eval_tasks import Exam
from search.benchmarking.selection import Selection
from search.benchmarking.tasks import TASKS
from search.model.loading import LoadedModel, load_model

__all__ = ["fake_data"]

HOME = Path(lm_eval.tasks.__file__).parent
SUBJECT = "high_school_us_history"


def stock_yaml(name: str) -> str:
    """The stock task of a benchmark: of MMLU that of one subject, which ours does without."""
    return {
        "mmlu": f"mmlu/default/mmlu_{SUBJECT}.yaml",
        "mmlu_answer": f"mmlu/continuation/mmlu_{SUBJECT}.yaml",
    }.get(name, TASKS[name].stock)


def chosen(name: str) -> Selection:
    """Two or three documents of a benchmark."""
    selection = select(TASKS[name], None, 0, frozenset())
    documents = [one for one in selection.documents if one.subject in ("", SUBJECT)][:3]
    return Selection(TASKS[name], tuple(documents), selection.available, 0)


def lm_eval_samples(selections: Sequence[Selection], model: HFLM, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What lm-eval's evaluator says of its stock tasks on these rows, by benchmark, filter after filter."""
    for selection in selections:
        name = selection.task.name
        file = folder / f"{name}.parquet"
        datasets.Dataset.from_list([dict(document.row) for document in selection.documents]).to_parquet(file)
        own = {
            "include": str(HOME / stock_yaml(name)),
            "task": f"stock_{name}",
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": dict.fromkeys(("train", "dev", "validation", "test"), str(file)),
                "cache_dir": str(folder / "cache"),
            },
        }
        (folder / f"{name}.yaml").write_text(json.dumps(own))
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    names = [f"stock_{selection.task.name}" for selection in selections]
    with torch.random.fork_rng(devices=[]):
        results = lm_eval.simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0, batch_size=2)
    return {name.removeprefix("stock_"): samples for name, samples in results["samples"].items()}


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model("random:tiny-llama", "cpu")


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_every_figure_of_every_item_is_that_of_lm_eval(tiny: LoadedModel, tmp_path: Path) -> None:
    selections = [chosen(name) for name in TASKS]
    theirs = lm_eval_samples(selections, HFLM(pretrained=tiny.model, tokenizer=tiny.tokenizer, batch_size=2), tmp_path)
    ours = LanguageModel(tiny)
    for selection in selections:
        name, exam, said = selection.task.name, Exam(selection), []

        def answer(requests: list[Instance], exam: Exam = exam, said: list[Any] = said) -> list[Any]:
            said += getattr(ours, exam.kind)(requests)
            return said

        figures = exam.grade(answer)
        samples = theirs[name]
        filters = list(dict.fromkeys(sample["filter"] for sample in samples))
        first = [sample for sample in samples if sample["filter"] == filters[0]]
        assert [request.args for request in exam.requests] == [one for s in first for one in s["arguments"]], name
        expected = [response for sample in first for [response] in sample["resps"]]
        if exam.kind == "loglikelihood":
            for mine, reference in zip(said, expected, strict=True):
                assert mine[0] == pytest.approx(reference[0], rel=1e-4, abs=1e-3), name
                assert mine[1] == reference[1], name
        else:
            assert said == expected, name
        for metric in first[0]["metrics"]:
            assert figures[metric] == [sample[metric] for sample in first], name
            for one in filters if len(filters) > 1 else ():
                values = [sample[metric] for sample in samples if sample["filter"] == one]
                assert figures[f"{metric},{one}"] == values, name
        assert selection.task.metric in figures


@pytest.mark.parametrize("name", ["mmlu", "mmlu_answer"])
def test_one_description_stands_for_those_of_all_subjects(name: str) -> None:
    folder = HOME / Path(TASKS[name].stock).parent
    described = {}
    for file in folder.glob("mmlu_*.yaml"):
        config = lm_eval.tasks._yaml_loader.load_yaml(file, recursive=False)
        if "description" in config:
            described[config["dataset_name"]] = config["description"]
    assert len(described) == 57
    for subject, description in described.items():
        rendered = re.sub(r"\{\{.*?\}\}", subject.replace("_", " "), TASKS[name].description)
        assert rendered == description


@pytest.mark.parametrize(("model", "begun"), [("llama", False), ("gpt2", False), ("llama", True)])
def test_whole_texts_and_empty_contexts_score_as_in_lm_eval(model: str, begun: bool) -> None:
    loaded = load_model(f"random:tiny-{model}", "cpu")
    if begun:
        with_beginning(loaded)
    loaded.model.config.max_position_embeddings = 64  # so that texts are cut into windows
    theirs = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1)
    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("a short text", "a long text " * 9)]
    expected = theirs.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert LanguageModel(loaded).loglikelihood_rolling(rolling)[0] == pytest.approx(expected[0], abs=1e-3)
    empty = [Instance("loglikelihood", {}, ("", text), 0) for text in ("yes", "perhaps")]
    for mine, reference in zip(
        LanguageModel(loaded).loglikelihood(empty), theirs.loglikelihood(empty, disable_tqdm=True), strict=True
    ):
        assert mine[0] == pytest.approx(reference[0], abs=1e-3)


def test_a_pair_longer_than_the_model_loses_its_beginning() -> None:
    loaded = load_model("random:tiny-llama", "cpu")
    loaded.model.config.max_position_embeddings = 32
    short, long = (Instance("loglikelihood", {}, ("x " * n + "What is it? It is", " a cow"), 0) for n in (0, 40))
    limited = LanguageModel(loaded).loglikelihood([long, short])
    whole = "x " * 40 + "What is it? It is a cow"
    cut = Instance("loglikelihood", {}, (whole[-32:-6], " a cow"), 0)
    assert limited[0][0] == pytest.approx(LanguageModel(loaded).loglikelihood([cut])[0][0], abs=1e-4)
    assert limited[1][0] != pytest.approx(limited[0][0], abs=1e-3)


def test_sampling_is_refused() -> None:
    request = Instance("generate_until", {}, ("Hello", {"until": ["."], "do_sample": True, "temperature": 1.0}), 0)
    with pytest.raises(ValueError, match="greedy"):
        LanguageModel(load_model("random:tiny-llama", "cpu")).generate_until([request])


def test_a_tokenizer_without_a_first_and_a_last_token_is_measured_where_a_task_needs_none() -> None:
    language = LanguageModel(tiny_gpt2(positions=300, ends=False))

    def asked(kind: str, *args: object) -> list[Instance]:
        return [Instance(request_type=kind, doc={}, arguments=args, idx=0)]

    assert language.loglikelihood(asked("loglikelihood", "A cat", " sat"))[0][0] < 0
    assert language.generate_until(asked("generate_until", "A cat", {"until": ["\n"], "max_gen_toks": 4}))
    with pytest.raises(Refusal, match="to score a text from its start"):
        language.loglikelihood(asked("loglikelihood", "", "A cat"))
    with pytest.raises(Refusal, match="to score a text from its start"):
        language.loglikelihood_rolling(asked("loglikelihood_rolling", "A cat"))


def test_a_token_without_an_embedding_is_refused_while_measuring() -> None:
    with pytest.raises(Refusal, match="embeddings for 100 tokens"):
        LanguageModel(tiny_gpt2(rows=100)).loglikelihood([Instance("loglikelihood", {}, ("täglich", " x"), 0)])
