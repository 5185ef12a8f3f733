"""Items as prompts: the letter form and the answer-text form, as lm-eval writes them."""

from __future__ import annotations

from dataclasses import dataclass

from compression.refusal import Refusal
from search.data.items import Item

__all__ = ["Prompt", "forms", "render"]


@dataclass(frozen=True)
class Prompt:
    """An item as a prompt: each continuation follows the context as it stands, leading space included."""

    context: str
    continuations: tuple[str, ...]
    answer: int


def forms(proxy: str) -> tuple[str, ...]:
    """The prompt forms of a proxy, the default first.

    "letter" asks for A, B, …; it is there where the correct answer has no fixed place among the choices and these are
    answers rather than endings.
    """
    return ("answer",) if proxy in ("sciq", "piqa", "hellaswag", "boolq") else ("answer", "letter")


def render(item: Item, proxy: str = "mmlu", form: str = "answer") -> Prompt:
    """An item as lm-eval 0.4 prompts it without examples, continuations by " " as there.

    Args:
        item: the item.
        proxy: one of `PROXIES`; anything else (a JSONL file) is rendered as mmlu.
        form: "answer", the choices' texts (tasks `mmlu_continuation`, `arc_easy`, `sciq`, `piqa`, `hellaswag`), or
            "letter", the choices lettered in the context (task `mmlu`).

    Raises:
        ValueError: a form that the proxy does not have.
    """
    if form not in forms(proxy):
        raise Refusal(f"form must be {' or '.join(forms(proxy))} for {proxy}, got {form!r}")
    question, continuations = item.question, item.choices
    if proxy == "hellaswag":
        context = question
    elif proxy == "boolq":
        context = f"{item.passage}\nQuestion: {question}?\nAnswer:"
    elif proxy == "sciq":
        context = f"{item.passage.lstrip()}\nQuestion: {question}\nAnswer:"
    elif proxy in ("arc_easy", "piqa") and form == "answer":
        context = f"Question: {question}\nAnswer:"
    else:
        kind = "multiple choice questions" if form == "letter" else "questions"
        about = item.subject.replace("_", " ")
        context = f"The following are {kind} (with answers) about {about}.\n\n" if about else ""
        context += f"{item.passage.strip()}\n" if item.passage.strip() else ""
        if form == "letter":
            continuations = tuple(chr(ord("A") + index) for index in range(len(item.choices)))
            lettered = [f"{letter}. {choice}\n" for letter, choice in zip(continuations, item.choices, strict=True)]
            context += f"{question.strip()}\n{''.join(lettered)}Answer:"
        else:
            context += f"Question: {question.strip()}\nAnswer:"
    return Prompt(context, tuple(f" {continuation}" for continuation in continuations), item.answer)
