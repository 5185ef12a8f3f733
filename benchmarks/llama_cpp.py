"""Runs a GGUF file in llama.cpp by the package xllamacpp; needs nothing of this project.

    PYTHON benchmarks/llama_cpp.py < request.json

PYTHON is an interpreter that has the package, such as that of `make setup-dev`. The request is a JSON object; the
answer is one on the last line of the output.

    model       path of the GGUF file
    prompts     lists of token ids, or texts
    tokens      number of tokens to generate greedily for each prompt
    top         number of candidates whose log-probabilities are returned for each generated token
    banned      token ids that are never generated, such as bytes that are no text by themselves: the package leaves
                these out of its answer
    threads     threads of llama.cpp
    context     length of the context in tokens
    verbosity   how much llama.cpp tells; from 4 on, the buffers that it holds weights in

The answer has `version` of the package, `resident` (bytes of memory that the process gained by loading), and one entry
of `answers` for each prompt: `tokens` (ids), `top` (pairs of id and log-probability for each token), `read` (number of
tokens of the prompt as llama.cpp read it), `prefill` and `decode` in tokens a second.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def resident() -> int:
    """Bytes of memory that this process occupies now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


def main() -> None:
    """Answers one request."""
    import xllamacpp

    request: dict[str, Any] = json.load(sys.stdin)
    params = xllamacpp.CommonParams()
    params.model.path = request["model"]
    params.n_ctx = request.get("context", 512)
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request.get("threads", 1)
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.warmup = False
    params.verbosity = request.get("verbosity", 0)
    before = resident()
    server = xllamacpp.Server(params)
    gained = resident() - before
    answers = []
    for prompt in request["prompts"]:
        said = server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": request["tokens"],
                "temperature": 0.0,
                "n_probs": request.get("top", 1),
                "cache_prompt": False,
                "ignore_eos": True,
                "logit_bias": [[token, False] for token in request.get("banned", ())],
            }
        )
        said = json.loads(said) if isinstance(said, str) else said
        if "error" in said:
            raise SystemExit(str(said["error"]))
        places = said["choices"][0]["logprobs"]["content"]
        answers.append(
            {
                "tokens": [place["id"] for place in places],
                "top": [[[each["id"], each["logprob"]] for each in place["top_logprobs"]] for place in places],
                "read": said["usage"]["prompt_tokens"],
                "prefill": said["timings"]["prompt_per_second"],
                "decode": said["timings"]["predicted_per_second"],
            }
        )
    print(json.dumps({"version": xllamacpp.__version__, "resident": gained, "answers": answers}))


if __name__ == "__main__":
    main()
