"""Times a model in vLLM; needs nothing of this project.

    PYTHON benchmarks/vllm_speed.py DIR

PYTHON is an interpreter of an environment that has vLLM. The first line of the output that begins with a brace is a
JSON object with `version` of vLLM and `weights`, the bytes of memory that the process gained while vLLM loaded the
weights and put them into the form in which it multiplies by them. After that, each line of the input is a JSON object
with `requests`, `prompt` and `new`: so many prompts of so many random tokens are answered in one batch, each with so
many greedy tokens. The answer is a line with the `seconds` that took.

vLLM runs in this process, in float32, with one thread, and without compiling the model.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_PLUGINS": "",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
}


def private() -> int:
    """Bytes of memory that this process occupies now, without pages of files."""
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def main() -> None:
    """Loads the model and answers requests until the input ends."""
    os.environ.update(_SETTINGS)
    import vllm
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    gained = []
    load = BaseModelLoader.load_model

    def measured(self: Any, *given: Any, **named: Any) -> Any:
        before = private()
        model = load(self, *given, **named)
        gained.append(private() - before)
        return model

    BaseModelLoader.load_model = measured
    engine = vllm.LLM(
        sys.argv[1],
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_batched_tokens=2048,
        max_num_seqs=8,
        enable_prefix_caching=False,
    )
    print(json.dumps({"version": vllm.__version__, "weights": gained[0]}), flush=True)
    vocabulary = engine.get_tokenizer().vocab_size
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = [
            {"prompt_token_ids": [random.randrange(vocabulary) for _ in range(asked["prompt"])]}
            for _ in range(asked["requests"])
        ]
        how = vllm.SamplingParams(temperature=0, max_tokens=asked["new"], ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        engine.generate(prompts, how, use_tqdm=False)
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()
