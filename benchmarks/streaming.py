"""Predicts and measures the memory of statistics and decomposition block by block, under a limit on the process.

    python -m benchmarks.streaming [--model random:llama-3.2-1b] [--limit 0.7] [--tokens 512] [--decompose 4] [--write]

Two processes get the same RLIMIT_DATA. On Linux this limits all private writable memory of a process; allocations
beyond it fail. One process loads the whole model and is expected to fail. The other streams the model: it collects the
second moments of every site over random tokens, and writes `lowrank` factors in the two-sided metric, up to a cap on χ,
to a factor cache. The weights are random float32 numbers in the public shape of the model.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.memory import peak_resident
from benchmarks.report import Bar, markdown, publish
from compression import FactorCache
from compression.calibration.footprint import BlockShape, footprint
from search.model.loading import load_model
from search.model.random_models import SHAPES
from search.model.streaming import StreamedModel, decompose_streamed

ROW, BATCH = 128, 256  # tokens
LLAMA_70B = BlockShape(8192, 28672, 1024, 80, 128256, tied=False, bytes_per_weight=2)


def shape(name: str, bytes_per_weight: int) -> BlockShape:
    """Returns the block shape of a random model from its configuration."""
    fields = SHAPES[name]
    head = fields.get("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    return BlockShape(
        hidden=fields["hidden_size"],
        mlp=fields["intermediate_size"],
        key_value=fields["num_key_value_heads"] * head,
        blocks=fields["num_hidden_layers"],
        vocabulary=fields["vocab_size"],
        tied=fields["tie_word_embeddings"],
        bytes_per_weight=bytes_per_weight,
    )


def gigabytes(count: float) -> str:
    """Formats bytes as GB with two decimals."""
    return f"{count / 1e9:.2f}"


def arithmetic() -> str:
    """Returns a Markdown table of the predicted bytes of every shape."""
    rows = []
    cases = [(name.removeprefix("random:"), shape(name, 4), 65536) for name in SHAPES]
    cases += [("llama-2-7b", shape("random:llama-2-7b", 2), 65536), ("llama-3-70b", LLAMA_70B, 65536)]
    for name, subject, tokens in cases:
        needed = footprint(subject, tokens, batch_tokens=1024, row_tokens=256)
        rows.append(
            [
                f"{name}, {'float32' if subject.bytes_per_weight == 4 else 'bfloat16'}",
                *map(gigabytes, (subject.model_bytes, subject.block_bytes, needed.ends, needed.collecting)),
                *map(gigabytes, (needed.decomposing, needed.peak)),
                f"{needed.peak / subject.model_bytes:.2f}",
                gigabytes(needed.scratch),
            ]
        )
    header = ["model", "whole", "one block", "embedding or head", "collecting", "decomposing", "peak", "peak / whole"]
    return markdown([*header, "on disk"], rows)


def whole(name: str) -> dict[str, object]:
    """Tries to load all weights into memory; reports the refusal or the peak."""
    try:
        load_model(name, "cpu", torch.float32)
    except (RuntimeError, MemoryError) as error:
        return {"refused": True, "reason": str(error).splitlines()[0][:160]}
    return {"refused": False, "peak": peak_resident()}


def streamed(name: str, tokens: int, chi: int, decompose: int) -> dict[str, object]:
    """Collects the statistics of every block, decomposes the first `decompose` blocks, and reports memory and time."""
    before, start = peak_resident(), time.perf_counter()
    times: list[float] = []

    def progress(what: str) -> None:
        times.append(time.perf_counter() - start)
        print(f"{times[-1]:7.1f} s  {peak_resident() / 1e9:.2f} GB  {what}", file=sys.stderr, flush=True)

    model = StreamedModel(name, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(SHAPES[name]["vocab_size"], (tokens // ROW, ROW), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    split = BATCH // ROW
    with tempfile.TemporaryDirectory() as folder:
        decompose_streamed(
            model,
            list(zip(ids.split(split), mask.split(split), strict=True)),
            generator,
            FactorCache(Path(folder)),
            statistics_key=f"random {tokens}",
            shrinkage=0.003,
            max_chi=chi,
            blocks=range(decompose),
            scratch=Path(folder),
            progress=progress,
        )
        files = [path.stat().st_size for path in Path(folder).rglob("*.safetensors")]
    return {
        "libraries": before,
        "peak": peak_resident(),
        "seconds": time.perf_counter() - start,
        "files": len(files),
        "written": sum(files),
    }


def child(arguments: argparse.Namespace, part: str, limit: int) -> dict[str, object]:
    """Runs one part in its own process under a limit of `limit` bytes and returns its report."""
    command = [sys.executable, "-m", "benchmarks.streaming", "--part", part, "--limit-bytes", str(limit)]
    for option in ("model", "tokens", "chi", "decompose"):
        command += [f"--{option}", str(getattr(arguments, option))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Measure memory of statistics and decomposition block by block.")
    parser.add_argument("--model", default="random:llama-3.2-1b", choices=list(SHAPES), help="random model to stream")
    parser.add_argument("--limit", type=float, default=0.7, help="memory limit, as a fraction of the whole model")
    parser.add_argument("--tokens", type=int, default=512, help="random calibration tokens (default: 512)")
    parser.add_argument("--chi", type=int, default=128, help="cap on χ (default: 128)")
    parser.add_argument("--decompose", type=int, default=4, help="number of blocks to decompose (default: 4)")
    parser.add_argument("--quick", action="store_true", help="use 256 tokens and decompose one block")
    parser.add_argument("--write", action="store_true", help="write results/streaming.md")
    parser.add_argument("--part", choices=["whole", "streamed"], help=argparse.SUPPRESS)
    parser.add_argument("--limit-bytes", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        resource.setrlimit(resource.RLIMIT_DATA, (arguments.limit_bytes, arguments.limit_bytes))
        if arguments.part == "whole":
            print(json.dumps(whole(arguments.model)))
        else:
            print(json.dumps(streamed(arguments.model, arguments.tokens, arguments.chi, arguments.decompose)))
        return
    if arguments.quick:
        arguments.tokens, arguments.decompose = 256, 1
    subject = shape(arguments.model, 4)
    limit = int(arguments.limit * subject.model_bytes)
    needed = footprint(subject, arguments.tokens, BATCH, ROW)
    refused = child(arguments, "whole", limit)
    found = child(arguments, "streamed", limit)
    peak, libraries = float(str(found["peak"])), float(str(found["libraries"]))
    lines = [
        "Predicted memory in GB, in addition to that of the libraries, for 65,536 tokens in batches of 1,024 and rows "
        "of 256:",
        arithmetic(),
        f"Measured on `{arguments.model}` in float32 ({gigabytes(subject.model_bytes)} GB) with {arguments.tokens} "
        f"random tokens, χ up to {arguments.chi}, under RLIMIT_DATA of {gigabytes(limit)} GB, {arguments.limit:.0%} of "
        "the model:",
        markdown(
            ["figure", "value"],
            [
                ["whole model under the limit", refused.get("reason", "loaded")],
                ["blocks with statistics", subject.blocks],
                ["blocks decomposed", f"{min(arguments.decompose, subject.blocks)} (all need the same memory)"],
                ["cache files, GB", f"{found['files']}, {gigabytes(float(str(found['written'])))}"],
                ["seconds", f"{float(str(found['seconds'])):.0f}"],
                ["peak resident, GB", gigabytes(peak)],
                ["of that libraries, GB", gigabytes(libraries)],
                ["predicted over libraries, GB", gigabytes(needed.peak)],
            ],
        ),
    ]
    bars = [
        Bar("whole-model-refused-under-the-limit", float(bool(refused["refused"])), ">=", 1),
        Bar("streamed-peak-over-model-bytes", peak / subject.model_bytes, "<=", 1),
        Bar("measured-over-predicted-peak", (peak - libraries) / needed.peak, "<=", 1.25),
    ]
    publish("benchmarks.streaming", "Streaming block by block", "\n\n".join(lines), bars, arguments.write)


if __name__ == "__main__":
    main()
