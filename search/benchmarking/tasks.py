"""Define the benchmarks: their stock lm-eval tasks, the sources of their rows, and the metric shown in the table.

Knows names and data layouts; does not know the interface of lm-eval or models. The hub and the data packages hold the
same rows of every task but `summaries`, so both sources give the same items.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compression.refusal import Refusal, nearest
from search.data.datasets import read_item
from search.data.items import Item
from search.data.passages import PAPERS

__all__ = ["GROUPS", "TASKS", "Hub", "Task", "named_tasks"]

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Hub:
    """The data set, configuration and split that hold the rows of a task on the hub."""

    path: str
    config: str | None
    split: str


@dataclass(frozen=True)
class Task:
    """One benchmark.

    Attributes:
        name: name on the command line and in tables.
        stock: path of the lm-eval YAML file of the task, relative to `lm_eval/tasks`.
        metric: the metric shown in the table; all metrics of the stock task are stored.
        folder: location of the rows in the data packages.
        hub: location of the same rows on the hub.
        question: turns a row into an item, whose digest keeps searched and reported items apart.
        form: turns a row of either source into the row that the stock task expects, without other fields.
        texts: turns all rows of either source into rows of the task, for tasks whose items are not rows of the source.
        description: template for the description in the prompt, filled from the row, for tasks whose description in
            lm-eval depends on the subject; otherwise empty.
    """

    name: str
    stock: str
    metric: str
    folder: str
    hub: Hub
    question: Callable[[Row], Item]
    form: Callable[[Row], Row]
    texts: Callable[[Iterable[Row]], Iterable[Row]] = iter
    description: str = ""


def _as(proxy: str) -> Callable[[Row], Item]:
    return lambda row: read_item(proxy, row)


def _text(question: str, passage: str = "") -> Callable[[Row], Item]:
    """For tasks that are no proxy: turns a row into an item with its question and placeholder answers."""
    return lambda row: Item(row[question], ("yes", "no"), 0, passage=row[passage] if passage else "")


def _only(*fields: str) -> Callable[[Row], Row]:
    """Reduces a row to these fields: rows from the hub have more."""
    return lambda row: {field: row[field] for field in fields}


def _boolq(row: Row) -> Row:
    """Converts the answer to 1 or 0, as the stock task expects: the packages have true or false, the hub has 1 or 0."""
    label = int(row["answer" if "answer" in row else "label"])
    return {"passage": row["passage"], "question": row["question"], "label": label}


def _trivia(row: Row) -> Row:
    return {"question": row["question"], "answer": {"aliases": list(row["answer"]["aliases"])}}


def _articles(rows: Iterable[Row]) -> Iterator[Row]:
    """Different articles with their human summaries.

    From the data packages: introductions of papers with their abstracts, of Qasper, which has a row for each question
    on a paper. From the hub: news with their highlights. Only the first words of an article are read, because a prompt
    longer than a model's context would lose its beginning, which says what to do.
    """
    seen: set[str] = set()
    for row in rows:
        is_news = "article" in row
        article = row["article"] if is_news else _introduction(row)
        summary = row["highlights"] if is_news else row["abstract"]
        article = " ".join(article.split()[:_ARTICLE_WORDS])
        if article and summary.strip() and article not in seen:
            seen.add(article)
            yield {"article": article, "highlights": summary.strip()}


def _introduction(row: Row) -> str:
    """The paragraphs of a paper's introduction without marks of references; empty if it has none."""
    sections = zip(row["full_text"]["section_name"], row["full_text"]["paragraphs"], strict=True)
    text = " ".join(next((part for name, part in sections if name == "Introduction"), []))
    return re.sub(r" ?\b(BIB|FIG|TAB|SEC)REF\d+\b", "", text)


_MMLU = ("hails/mmlu_no_train/*/test", Hub("cais/mmlu", "all", "test"), _as("mmlu"))
_MMLU_FORM = _only("question", "subject", "choices", "answer")
_SUBJECT = "about {{subject.replace('_', ' ')}}.\n\n"
_ARC_FORM = _only("question", "choices", "answerKey")
_ARTICLE_WORDS = 400

_ALL = (
    Task(
        "mmlu",
        "mmlu/default/_default_template_yaml",
        "acc",
        *_MMLU,
        _MMLU_FORM,
        description=f"The following are multiple choice questions (with answers) {_SUBJECT}",
    ),
    Task(
        "hellaswag",
        "hellaswag/hellaswag.yaml",
        "acc_norm",
        "hellaswag/none/validation",
        Hub("Rowan/hellaswag", None, "validation"),
        _as("hellaswag"),
        _only("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    ),
    Task(
        "boolq",
        "super_glue/boolq/default.yaml",
        "acc",
        "boolq/none/validation",
        Hub("aps/super_glue", "boolq", "validation"),
        _text("question", "passage"),
        _boolq,
    ),
    Task(
        "triviaqa",
        "triviaqa/default.yaml",
        "exact_match",
        "trivia_qa/rc.wikipedia.nocontext/validation",
        Hub("mandarjoshi/trivia_qa", "rc.wikipedia.nocontext", "validation"),
        _text("question"),
        _trivia,
    ),
    Task(
        "gsm8k",
        "gsm8k/gsm8k-cot.yaml",
        "exact_match",
        "gsm8k/gold_bpb_5shot/requests.jsonl.gz",
        Hub("openai/gsm8k", "main", "test"),
        _text("question"),
        _only("question", "answer"),
    ),
    Task(
        "arc_easy",
        "arc/arc_easy.yaml",
        "acc",
        "ai2_arc/ARC-Easy/validation",
        Hub("allenai/ai2_arc", "ARC-Easy", "validation"),
        _as("arc_easy"),
        _ARC_FORM,
    ),
    Task(
        "arc_challenge",
        "arc/arc_challenge.yaml",
        "acc_norm",
        "ai2_arc/ARC-Challenge/validation",
        Hub("allenai/ai2_arc", "ARC-Challenge", "validation"),
        _as("arc_easy"),
        _ARC_FORM,
    ),
    Task(
        "piqa",
        "piqa/piqa.yaml",
        "acc",
        "piqa/plain_text/validation",
        Hub("baber/piqa", None, "validation"),
        _as("piqa"),
        _only("goal", "sol1", "sol2", "label"),
    ),
    Task(
        "sciq",
        "sciq/sciq.yaml",
        "acc",
        "sciq/none/validation",
        Hub("allenai/sciq", None, "validation"),
        _as("sciq"),
        _only("question", "support", "distractor1", "distractor2", "distractor3", "correct_answer"),
    ),
    Task(
        "winogrande",
        "winogrande/default.yaml",
        "acc",
        "winogrande/winogrande_xl/validation",
        Hub("allenai/winogrande", "winogrande_xl", "validation"),
        _text("sentence"),
        _only("sentence", "option1", "option2", "answer"),
    ),
    Task(
        "mmlu_answer",
        "mmlu/continuation/_continuation_template_yaml",
        "acc",
        *_MMLU,
        _MMLU_FORM,
        description=f"The following are questions (with answers) {_SUBJECT}",
    ),
    Task(
        "summaries",
        "cnn_dailymail/cnn_dailymail.yaml",
        "rougeL",
        f"{PAPERS}/requests.jsonl.gz",
        Hub("abisee/cnn_dailymail", "3.0.0", "test"),
        _text("article"),
        _only("article", "highlights"),
        _articles,
    ),
)

TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}
"""All benchmarks by name, in the order of the tables. GSM8K uses the stock task `gsm8k_cot`, whose eight examples are
part of lm-eval. The examples of the task `gsm8k` come from the training set, which no data package holds."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    "paper": ("mmlu", "hellaswag", "boolq", "triviaqa", "gsm8k"),
    "small": ("arc_easy", "arc_challenge", "piqa", "sciq", "winogrande", "mmlu_answer"),
    "all": tuple(name for name in TASKS if name != "summaries"),
}
"""Groups of tasks: the five that papers report, those on which small models differ measurably, and both."""


def named_tasks(words: Sequence[str]) -> tuple[Task, ...]:
    """The tasks that these names of tasks and groups stand for, each once, in the order of the tables.

    Raises:
        ValueError: a name is unknown; the message gives the nearest one.
    """
    wanted: set[str] = set()
    for word in words:
        if word not in TASKS and word not in GROUPS:
            known = [*TASKS, *GROUPS]
            raise Refusal(
                f"each task must be one of {', '.join(known)}, got {word!r}; the nearest is {nearest(word, known)}"
            )
        wanted |= set(GROUPS.get(word, (word,)))
    return tuple(task for name, task in TASKS.items() if name in wanted)
