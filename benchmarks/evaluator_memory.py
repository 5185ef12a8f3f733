"""Measures how much memory each additional evaluator process takes on one machine when all share one model.

    python -m benchmarks.evaluator_memory [--quick] [--write] [--model NAME ...] [--dtype NAME] [--processes N]

Memory is the proportional set size of real processes: shared pages are divided among the processes that use them. Each
process loads the model as `search.workers.remote_evaluator` does and makes one forward pass. Statistics and factors,
which are memory-mapped too, are not included. Python with torch and transformers takes about 350 MB in every process,
so only a model of 1 GB or more can meet the bar.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import pairwise

from benchmarks.report import Bar, markdown, publish

_MEMORY = """
import json, sys
import torch
from compression.storage.factor_cache import FactorCache
from search.model.loading import load_model
from search.workers.remote_evaluator import shared_model
from search.data.packages import cache_folder
torch.set_num_threads(1)
name, digest, dtype = sys.argv[1:]
if digest == "-":
    loaded = load_model(name, "cpu", getattr(torch, dtype))
    print(loaded.digest, sum(p.numel() * p.element_size() for p in loaded.model.parameters()))
    sys.exit()
cache = FactorCache(cache_folder() / "factors")
loaded = shared_model(name, torch.device("cpu"), getattr(torch, dtype), digest, cache)
with torch.inference_mode():
    loaded.model(torch.ones(1, 64, dtype=torch.long), use_cache=False)
print("ready", flush=True)
for line in sys.stdin:
    rows = dict(row.split()[:2] for row in open("/proc/self/smaps_rollup") if row.split()[0] in ("Pss:", "Rss:"))
    print(json.dumps({name: int(value) * 1024 for name, value in rows.items()}), flush=True)
"""


def memory(model: str, dtype: str, most: int) -> tuple[int, list[int]]:
    """Returns the bytes of the model, and the total bytes of 1, 2, …, `most` evaluators that have it in memory."""

    def start(digest: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", _MEMORY, model, digest, dtype]
        return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    digest, size = start("-").communicate()[0].split()
    running: list[subprocess.Popen[str]] = []
    totals = []
    try:
        for _ in range(most):
            running.append(start(digest))
            out = running[-1].stdout
            assert out is not None
            assert out.readline() == "ready\n", "an evaluator did not start"
            total = 0
            for one in running:
                assert one.stdin is not None
                assert one.stdout is not None
                one.stdin.write("\n")
                one.stdin.flush()
                total += json.loads(one.stdout.readline())["Pss:"]
            totals.append(total)
    finally:
        for one in running:
            one.kill()
            one.wait()
    return int(size), totals


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="measure the default model only")
    parser.add_argument("--write", action="store_true", help="write the table to results/")
    parser.add_argument("--model", nargs="+", help="models (default: default and random:llama-3.2-1b)")
    parser.add_argument("--dtype", default="bfloat16", help="torch dtype of the weights (default: bfloat16)")
    parser.add_argument("--processes", type=int, default=3, help="largest number of evaluators (default: 3)")
    given = parser.parse_args()
    rows, bars = [], []
    for model in given.model or (["default"] if given.quick else ["default", "random:llama-3.2-1b"]):
        size, totals = memory(model, given.dtype, given.processes)
        for count, (before, total) in enumerate(pairwise([0, *totals]), 1):
            own = total - before
            rows.append(
                (model, f"{size / 1e6:.0f}", count, f"{total / 1e6:.0f}", f"{own / 1e6:.0f}", f"{own / size:.2f}")
            )
            print(*rows[-1], flush=True)
        most = max((after - before) / size for before, after in pairwise(totals))
        bars.append(Bar(f"one more evaluator of {model}, in models", most, "<=", 0.35))
    header = ("model", "its MB", "evaluators", "MB together", "MB of the last", "in models")
    body = f"All weights are in {given.dtype}.\n\n" + markdown(header, rows)
    publish("benchmarks.evaluator_memory", "Memory of evaluators", body, bars, given.write)


if __name__ == "__main__":
    main()
