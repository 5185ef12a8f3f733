"""The benchmarks: their stock lm-eval task, where their rows lie, and which figure stands in the table.

Knows names and layouts; nothing of lm-eval's interface or of models. Every task reads the same pool from the hub as
from the data packages, so that both give the same items.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compression.refusal import Refusal, nearest
from search.data.datasets import read_item
from search.data.items import Item

__all__ = ["GROUPS", "TASKS", "Hub", "Task", "named_tasks"]

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Hub:
    """Where the hub has a task's rows."""

    path: str
    config: str | None
    split: str


@dataclass(frozen=True)
class Task:
    """One benchmark.

    Attributes:
        name: on the command line and in tables.
        stock: lm-eval's YAML of it, below `lm_eval/tasks`.
        metric: the figure of the table; all figures of the stock task are kept.
        folder: where the data package has its rows.
        hub: where the hub has the same rows.
        question: the row as an item, whose digest keeps what is searched on and what is reported apart.
        form: from a row of either place to the row that the stock task expects, with no other field.
        description: lm-eval's description of the task where it has one a subject; a template of the row.
    """

    name: str
    stock: str
    metric: str
    folder: str
    hub: Hub
    question: Callable[[Row], Item]
    form: Callable[[Row], Row]
    description: str = ""


def _as(proxy: str) -> Callable[[Row], Item]:
    return lambda row: read_item(proxy, row)


def _text(question: str, passage: str = "") -> Callable[[Row], Item]:
    """For rows that no proxy is made of: an item of the same question; its answers do not count."""
    return lambda row: Item(row[question], ("yes", "no"), 0, passage=row[passage] if passage else "")


def _only(*fields: str) -> Callable[[Row], Row]:
    """These fields of a row: the hub's rows have others beside them."""
    return lambda row: {field: row[field] for field in fields}


def _boolq(row: Row) -> Row:
    """The packages have the original's true and false, the hub SuperGLUE's 1 and 0, which the stock task reads."""
    label = int(row["answer" if "answer" in row else "label"])
    return {"passage": row["passage"], "question": row["question"], "label": label}


def _trivia(row: Row) -> Row:
    return {"question": row["question"], "answer": {"aliases": list(row["answer"]["aliases"])}}


_MMLU = ("hails/mmlu_no_train/*/test", Hub("cais/mmlu", "all", "test"), _as("mmlu"))
_MMLU_FORM = _only("question", "subject", "choices", "answer")
_SUBJECT = "about {{subject.replace('_', ' ')}}.\n\n"
_ARC_FORM = _only("question", "choices", "answerKey")

_ALL = (
    Task(
        "mmlu",
        "mmlu/default/_default_template_yaml",
        "acc",
        *_MMLU,
        _MMLU_FORM,
        f"The following are multiple choice questions (with answers) {_SUBJECT}",
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
        f"The following are questions (with answers) {_SUBJECT}",
    ),
)

TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}
"""All benchmarks by name, in the order of the tables. GSM8K is the stock `gsm8k_cot`, whose eight examples come with
lm-eval: those of `gsm8k` come from its training set, which no data package holds."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    "paper": ("mmlu", "hellaswag", "boolq", "triviaqa", "gsm8k"),
    "small": ("arc_easy", "arc_challenge", "piqa", "sciq", "winogrande", "mmlu_answer"),
    "all": tuple(TASKS),
}
"""Names for several: the five that papers report, those that carry signal at small scale, and both."""


def named_tasks(words: Sequence[str]) -> tuple[Task, ...]:
    """The tasks that names of tasks and groups stand for, each once, in the order of the tables.

    Raises:
        ValueError: an unknown name, with the nearest.
    """
    wanted: set[str] = set()
    for word in words:
        if word not in TASKS and word not in GROUPS:
            known = [*TASKS, *GROUPS]
            raise Refusal(f"tasks must be of {', '.join(known)}, got {word!r}; the nearest is {nearest(word, known)}")
        wanted |= set(GROUPS.get(word, (word,)))
    return tuple(task for name, task in TASKS.items() if name in wanted)
