"""Measures MMLU by letters with and without the chat template, and holds the logits against llama.cpp on the same file.

    python -m benchmarks.letters qwen2.5-coder-0.5b [--items N] [--write]

The items and the plain prompts are those of `search.py benchmark --tasks mmlu`. With the chat template, the same prompt
is the message of the user. The answer is the likeliest of the letters A to D. llama.cpp computes the next token of some
plain prompts from the file in 4 bits, rounding activations to 8; we compute them in float32 from the dequantized
weights.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.lab_models import LAB_MODELS, lab_model
from benchmarks.report import markdown, publish
from search.benchmarking.documents import select
from search.benchmarking.lm_eval_tasks import Exam
from search.benchmarking.tasks import named_tasks
from search.model.loading import LoadedModel, load_model

_LETTERS = "ABCD"
_TOP = 400
"""Candidates of llama.cpp among which the letters are looked for."""


def questions(items: int) -> list[tuple[str, int]]:
    """The prompts of MMLU questions and the numbers of their answers."""
    [task] = named_tasks(["mmlu"])
    requests = Exam(select(task, items, 0, frozenset())).requests
    return [(str(each.args[0]), int(each.doc["answer"])) for each in requests if each.idx == 0]


@torch.inference_mode()
def chosen(loaded: LoadedModel, prompt: list[int], before: str) -> tuple[int, torch.Tensor]:
    """The likeliest letter after a prompt, written after `before`, and the log-probabilities of the next token."""
    logs = loaded.model(input_ids=torch.tensor([prompt]), logits_to_keep=1).logits[0, -1].float().log_softmax(-1)
    letters = [loaded.encode(f"{before}{letter}")[-1] for letter in _LETTERS]
    return int(logs[letters].argmax()), logs


def in_chat(loaded: LoadedModel, prompt: str) -> list[int]:
    """The tokens of a prompt as the message of a user."""
    turns = [{"role": "user", "content": prompt}]
    text = loaded.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    found: list[int] = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def differences(file: Path, loaded: LoadedModel, prompts: list[str]) -> tuple[list[float], int]:
    """Differences of the letters' log-probabilities from llama.cpp's in nats, and how often both choose the same."""
    ids = [loaded.encode_whole(prompt) for prompt in prompts]
    request = {"model": str(file), "prompts": ids, "tokens": 1, "top": _TOP, "context": 4096}
    command = [sys.executable, str(Path(__file__).with_name("llama_cpp.py"))]
    ran = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=True)
    found, equal = [], 0
    letters = [loaded.encode(f" {letter}")[-1] for letter in _LETTERS]
    for prompt, answer in zip(ids, json.loads(ran.stdout.splitlines()[-1])["answers"], strict=True):
        other = dict(map(tuple, answer["top"][0]))
        mine, logs = chosen(loaded, prompt, " ")
        found += [abs(float(logs[letter]) - other[letter]) for letter in letters if letter in other]
        equal += mine == max(range(len(letters)), key=lambda number: other.get(letters[number], -math.inf))
    return found, equal


def main() -> None:
    """Measures and prints, and writes the table if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model", choices=LAB_MODELS, help="the model")
    parser.add_argument("--items", type=int, default=285, help="questions (default: 285, five a subject)")
    parser.add_argument("--compared", type=int, default=24, help="prompts for llama.cpp (default: 24)")
    parser.add_argument("--write", action="store_true", help="write the table to results/")
    given = parser.parse_args()
    file, asked = lab_model(given.model), questions(given.items)
    loaded = load_model(str(file), "cpu")
    rows: list[list[object]] = []
    for name, before in (("plain, as lm-eval", " "), ("in the chat template", "")):
        prompts = (loaded.encode_whole(text) if before else in_chat(loaded, text) for text, _ in asked)
        pairs = zip(prompts, asked, strict=True)
        right = sum(chosen(loaded, prompt, before)[0] == answer for prompt, (_, answer) in pairs)
        share = right / len(asked)
        error = math.sqrt(share * (1 - share) / len(asked))
        rows.append([name, str(loaded.model.dtype).removeprefix("torch."), len(asked), f"{share:.3f} ± {error:.3f}"])
        print(*rows[-1], flush=True)
    precise = load_model(str(file), "cpu", torch.float32)
    found, equal = differences(file, precise, [text for text, _ in asked[: given.compared]])
    said = (
        f"llama.cpp chooses the same letter after {equal} of {given.compared} plain prompts, and its log-probabilities "
        f"of the letters differ by {sum(found) / len(found):.3f} nats on average, by {max(found):.3f} at most "
        f"({len(found)} letters among its {_TOP} likeliest tokens)."
    )
    body = f"{markdown(['prompt', 'type', 'items', 'accuracy'], rows)}\n\n{said}"
    publish("benchmarks.letters", f"MMLU by letters: {given.model}", body, [], given.write, given.model)


if __name__ == "__main__":
    main()
