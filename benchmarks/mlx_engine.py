"""Runs a folder in mlx-lm, in float32; needs nothing of this project.

    PYTHON benchmarks/mlx_engine.py < requests

PYTHON is an interpreter that has mlx-lm, such as that of `make setup-dev` on Linux. A request is a line with a JSON
object; the answer is another, on a line of the output.

    model       path of the folder; the code in it runs if config.json names some as "model_file"
    prompts     lists of token ids
    tokens      number of tokens to generate greedily for each prompt
    top         number of largest log-probabilities that are returned for the first token

The answer has `version` of mlx-lm, `resident` (bytes of memory that the process gained by loading), and one entry of
`answers` for each prompt: `tokens` (ids) and `first` (log-probabilities, descending).
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def resident() -> int:
    """Bytes of memory that this process occupies now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


def main() -> None:
    """Answers each request."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        before = resident()
        model, _ = load_model(Path(request["model"]), trust_remote_code=True)
        gained = resident() - before
        model.set_dtype(mx.float32)  # in float16 its products on a processor add up in float16
        answers = []
        for prompt in request["prompts"]:
            steps = list(generate_step(mx.array(prompt), model, max_tokens=request["tokens"]))
            first = sorted((float(score) for score in steps[0][1].tolist()), reverse=True)[: request["top"]]
            answers.append({"tokens": [int(token) for token, _ in steps], "first": first})
        print(json.dumps({"version": version("mlx-lm"), "resident": gained, "answers": answers}))


if __name__ == "__main__":
    main()
