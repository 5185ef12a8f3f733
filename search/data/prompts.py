"""Renders items as prompts, in the letter form or the answer-text form, as lm-eval does."""

from __future__ import annotations

from dataclasses import dataclass

from compression.refusal import Refusal
from search.data.items import Item

__all__ = ["Prompt", "forms", "render"]


@dataclass(frozen=True)
class Prompt:
    """An item as a prompt; context + continuation is the text to score, the leading space of continuations included.

    Attributes:
        context: text before the answer.
        continuations: one text per choice.
        answer: index of the correct continuation, from 0.
        instruction: start of the context that announces the question in words that many items share; may be empty.
    """

    context: str
    continuations: tuple[str, ...]
    answer: int
    instruction: str = ""


def forms(proxy: str) -> tuple[str, ...]:
    """Return the prompt forms of a proxy, the default first.

    The form "letter" asks for A, B, …. It exists only if the position of the correct answer varies and the choices are
    answers rather than endings of a text.
    """
    return ("answer",) if proxy in ("sciq", "piqa", "hellaswag", "boolq") else ("answer", "letter")


def render(item: Item, proxy: str = "mmlu", form: str = "answer") -> Prompt:
    """Render an item as the zero-shot prompt of lm-eval 0.4; as there, a space precedes each continuation.

    Args:
        item: the item.
        proxy: one of `PROXIES` or "boolq"; anything else, such as a JSONL file, is rendered as mmlu.
        form: "answer", in which the continuations are the texts of the choices (tasks `mmlu_continuation`, `arc_easy`,
            `sciq`, `piqa`, `hellaswag`), or "letter", in which the context lists lettered choices (task `mmlu`).

    Raises:
        ValueError: the proxy does not have this form.
    """
    if form not in forms(proxy):
        raise Refusal(f"form must be {' or '.join(forms(proxy))} for {proxy}, got {form!r}")
    question, continuations, instruction = item.question, item.choices, ""
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
        instruction = f"The following are {kind} (with answers) about {about}.\n\n" if about else ""
        context = instruction + (f"{item.passage.strip()}\n" if item.passage.strip() else "")
        if form == "letter":
            continuations = tuple(chr(ord("A") + index) for index in range(len(item.choices)))
            lettered = [f"{letter}. {choice}\n" for letter, choice in zip(continuations, item.choices, strict=True)]
            context += f"{question.strip()}\n{''.join(lettered)}Answer:"
        else:
            context += f"Question: {question.strip()}\nAnswer:"
    return Prompt(context, tuple(f" {continuation}" for continuation in continuations), item.answer, instruction)
