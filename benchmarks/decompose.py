"""Decomposition speed, error and memory against tensorly and quimb, all χ up to a cap from one decomposition.

    python -m benchmarks.decompose [--quick] [--write] [--measured FILE [--minutes M]] [--peer-seconds 330]

The peers are not dependencies of Chisel: pip install tensorly quimb

A measurement is one process that makes the matrix, decomposes it once after a warm-up on a small one, and reports the
seconds of that call, the true relative error ‖W − left·right‖_F / ‖W‖_F and the growth of its resident memory from
before the matrix was made, so the matrix itself counts. Processes of the two sides alternate. A randomized method of a
peer is given the fewest power iterations with which its error is within 0.5 % of the optimum.

Matrices: `power`, singular values falling as i^-½ (a Gaussian matrix with scaled rows, mixed by a reflection), and
`flat`, a Gaussian matrix, whose singular values differ by a factor of 4 in all: the hard case for iterations.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import isinf, isnan
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.report import Bar, markdown, publish
from compression import decompose, resolve

CHIS, QUICK_CHIS = (64, 512), (16, 128)  # a 64th and an eighth of the smaller side
ITERATIONS = (1, 2, 3, 4, 6, 8)
TOLERANCE = 0.005  # errors are equal within this part of the optimum
RANDOMIZED = ("tensorly randomized", "quimb svd:rand")


@dataclass(frozen=True)
class Case:
    """One call to measure; χ 0 is the full spectrum, iterations 0 where the method has none."""

    contender: str
    rows: int
    columns: int
    spectrum: str
    chi: int
    iterations: int = 0
    repeat: int = 0


@dataclass(frozen=True)
class Measured:
    """Seconds of the call, relative error, peak memory over that of the matrix; infinite seconds if it was cut off."""

    seconds: float
    error: float
    memory: float


def matrix(rows: int, columns: int, spectrum: str) -> torch.Tensor:
    """The subject, float32, the same every time; made in place so that it does not set the peak itself."""
    generator = torch.Generator().manual_seed(0)
    result = torch.empty(rows, columns)
    for row in result:
        row.normal_(generator=generator)
    if spectrum == "power":
        result.mul_(torch.arange(1, rows + 1).pow(-0.5)[:, None])
    direction = torch.nn.functional.normalize(torch.randn(rows, generator=generator), dim=0)
    return result.addr_(direction, direction @ result, alpha=-2)


def call(case: Case) -> Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]:
    """The contender as a function of a matrix and χ that gives left and right factors."""
    if case.contender == "chisel":

        def chisel(weight: torch.Tensor, chi: int) -> tuple[torch.Tensor, torch.Tensor]:
            cores, _ = decompose(weight, resolve("lowrank", *weight.shape), chi)
            return cores[0][0, :, 0], cores[1][:, 0, :, 0]

        return chisel
    if case.contender.startswith("tensorly"):
        from tensorly.decomposition import tensor_train
        from tensorly.tenalg.svd import svd_interface

        def tensorly(weight: torch.Tensor, chi: int) -> tuple[torch.Tensor, torch.Tensor]:
            if case.iterations:  # what tensor_train(svd="randomized_svd") does, with the iterations to choose
                left, values, right = svd_interface(
                    weight.numpy(), method="randomized_svd", n_eigenvecs=chi, n_iter=case.iterations, random_state=0
                )
                return torch.from_numpy(left), torch.from_numpy(values[:, None] * right)
            left, right = tensor_train(weight.numpy(), rank=[1, chi, 1]).factors
            return torch.from_numpy(left[0]), torch.from_numpy(right[:, :, 0])

        return tensorly
    from quimb.tensor.decomp import array_split

    def quimb(weight: torch.Tensor, chi: int) -> tuple[torch.Tensor, torch.Tensor]:
        options: dict[str, Any] = {"cutoff": 0.0}
        if case.iterations:
            options = {"num_iterations": case.iterations, "seed": 0}
        left, _, right = array_split(weight, case.contender.split()[1], absorb="right", max_bond=chi, **options)
        return left, right

    return quimb


def measure(case: Case) -> Measured:
    """In this process, once."""
    decomposition = call(case)
    decomposition(matrix(96, 128, "flat"), 16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    weight = matrix(case.rows, case.columns, case.spectrum)
    start = time.perf_counter()
    left, right = decomposition(weight, case.chi or min(case.rows, case.columns))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    norm = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
    step = 512
    squared = sum(
        float((weight[row : row + step] - left[row : row + step] @ right).double().square().sum())
        for row in range(0, case.rows, step)
    )
    return Measured(seconds, squared**0.5 / norm, (peak - before) * 1024 / weight.nbytes)


class Laboratory:
    """Makes measurements in processes of their own, or takes them from the file of an earlier run.

    Args:
        file: where measurements are kept, so that a long run can be made in pieces; None keeps none.
        peer_seconds: a peer's process is ended after this long.
        minutes: no measurement is begun later than this.
    """

    def __init__(self, file: Path | None, peer_seconds: float, minutes: float) -> None:
        self._file = file
        self._end = time.monotonic() + 60 * minutes
        self._limit = peer_seconds
        lines = file.read_text(encoding="utf-8").splitlines() if file is not None and file.exists() else []
        self._known = {Case(**case): Measured(**result) for case, result in map(json.loads, lines)}

    def of(self, case: Case) -> Measured:
        """The result of one case."""
        if case not in self._known:
            if time.monotonic() > self._end:
                raise SystemExit("out of minutes; run again to go on from what --measured holds")
            command = [sys.executable, "-m", "benchmarks.decompose", "--case", json.dumps(asdict(case))]
            limit = None if case.contender == "chisel" else self._limit
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=True)
                self._known[case] = Measured(**json.loads(done.stdout.splitlines()[-1]))
            except subprocess.TimeoutExpired:
                self._known[case] = Measured(float("inf"), float("nan"), float("nan"))
            except subprocess.CalledProcessError as error:
                raise RuntimeError(f"{case}: {error.stderr[-500:]}") from error
            print(case, self._known[case], file=sys.stderr, flush=True)
            if self._file is not None:
                with self._file.open("a", encoding="utf-8") as handle:
                    handle.write(json.dumps([asdict(case), asdict(self._known[case])]) + "\n")
        return self._known[case]

    def median(self, cases: Sequence[Case]) -> Measured:
        """Of repeats, each figure for itself."""
        results = [self.of(case) for case in cases]
        return Measured(
            *(median(getattr(result, name) for result in results) for name in ("seconds", "error", "memory"))
        )


def compare(
    laboratory: Laboratory,
    rows: int,
    columns: int,
    spectrum: str,
    chi: int,
    repeats: int,
    contenders: Sequence[str],
    enough: dict[tuple[str, str, int], int],
) -> dict[str, tuple[Measured, int]]:
    """Result and power iterations by contender at one χ, the sides alternating.

    Args:
        enough: power iterations that a contender needed for a spectrum and χ on the shape before; updated.
    """
    settings = dict.fromkeys(contenders, 0)
    best = laboratory.of(Case("chisel", rows, columns, spectrum, chi)).error
    for contender in [name for name in contenders if name in RANDOMIZED]:
        for iterations in ITERATIONS:
            if iterations < enough.get((contender, spectrum, chi), 0):
                continue
            settings[contender] = enough[contender, spectrum, chi] = iterations
            if laboratory.of(Case(contender, rows, columns, spectrum, chi, iterations)).error <= best * (1 + TOLERANCE):
                break
    cases = {
        contender: [Case(contender, rows, columns, spectrum, chi, iterations, repeat) for repeat in range(repeats)]
        for contender, iterations in settings.items()
    }
    for repeat in range(repeats):
        for contender in contenders:
            laboratory.of(cases[contender][repeat])
    return {contender: (laboratory.median(cases[contender]), settings[contender]) for contender in contenders}


@dataclass
class Findings:
    """Rows of the table and what the bars are made of, over all comparisons."""

    rows: list[list[object]]
    over_default: list[float]
    over_best: list[float]
    over_default_full: list[float]
    memory: list[float]

    def add(
        self, shape: tuple[int, int], spectrum: str, chi: int, results: dict[str, tuple[Measured, int]], limit: float
    ) -> None:
        """One comparison; a peer that was ended counts with its `limit`, a lower bound."""
        ours = results["chisel"][0]
        self.memory.append(ours.memory)
        optimum = min(result.error for result, _ in results.values() if not isnan(result.error))
        for name, (result, iterations) in results.items():
            ended = isinf(result.seconds)
            # Of the whole spectrum nothing but rounding is left.
            equal = ended or result.error <= optimum * (1 + TOLERANCE) + 1e-5
            ratio = (limit if ended else result.seconds) / ours.seconds
            if equal and name != "chisel":
                if chi:
                    self.over_best.append(ratio)
                if name.endswith(" svd"):
                    (self.over_default if chi else self.over_default_full).append(ratio)
            method = f"{name}, {iterations} iterations" if iterations else name
            self.rows.append(
                [
                    method if equal else f"{method} (error not equal)",
                    f"{shape[0]} × {shape[1]}",
                    spectrum,
                    chi or "all",
                    f"> {limit:g}" if ended else f"{result.seconds:.2f}",
                    "" if ended else f"{result.error:.5f}",
                    "" if ended else f"{result.memory:.1f}",
                    "" if name == "chisel" else f"{'> ' if ended else ''}{ratio:.1f}",
                ]
            )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="decomposition speed against tensorly and quimb")
    parser.add_argument("--quick", action="store_true", help="one smaller matrix")
    parser.add_argument("--write", action="store_true", help="write results/decompose.md")
    parser.add_argument("--measured", type=Path, help="keep measurements in this file and reuse those it holds")
    parser.add_argument("--peer-seconds", type=float, default=330, help="a peer is ended after this long")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after this long, to go on from --measured")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(asdict(measure(Case(**json.loads(arguments.case))))))
        return
    if missing := [name for name in ("tensorly", "quimb") if importlib.util.find_spec(name) is None]:
        raise SystemExit(f"the peers {' and '.join(missing)} are not installed; run: pip install tensorly quimb")
    laboratory = Laboratory(arguments.measured, arguments.peer_seconds, arguments.minutes)
    shapes = [(1024, 2752)] if arguments.quick else [(4096, 11008), (8192, 28672)]
    low, high = QUICK_CHIS if arguments.quick else CHIS
    findings, enough = Findings([], [], [], [], []), {}
    for rows, columns in shapes:
        large = rows > 4096
        for spectrum in ("power",) if large else ("power", "flat"):
            for chi in (high, 0) if large else (low, high, 0):
                # A default SVD takes as long for every χ.
                others = [] if chi == low else ["tensorly svd", "quimb svd"]
                others += [] if chi == low or large else ["quimb svd:eig"]
                others += RANDOMIZED if chi else ()
                results = compare(
                    laboratory, rows, columns, spectrum, chi, 3 if rows < 4096 else 1, ["chisel", *others], enough
                )
                findings.add((rows, columns), spectrum, chi, results, arguments.peer_seconds)
    header = ["method", "matrix", "spectrum", "χ up to", "seconds", "relative error", "memory / matrix", "times ours"]
    notes = (
        "One decomposition for all χ up to the cap. Relative error is ‖W − left·right‖ / ‖W‖, measured; errors within "
        f"{100 * TOLERANCE:g} % of the smallest count as equal. `svd` is the peers' default, which computes the whole "
        "spectrum whatever the cap; `svd:eig` and the randomized methods are the best that they offer, with the fewest "
        f"power iterations out of {', '.join(map(str, ITERATIONS))} that reach equal error. tensorly's `symeig_svd` "
        "forms the Gram matrix of the larger side and is left out. Memory is the peak of the process over what it held "
        "before the matrix was made, the matrix included. Spectra: `power` falls as i^-½, `flat` is Gaussian."
    )
    bars = [
        Bar("capped-speed-over-default-svd", min(findings.over_default), ">=", 5),
        Bar("capped-speed-over-best-peer-method", min(findings.over_best), ">=", 5),
        Bar("full-spectrum-speed-over-default-svd", min(findings.over_default_full), ">=", 1),
        Bar("memory-over-matrix", max(findings.memory), "<=", 4),
    ]
    body = f"{markdown(header, findings.rows)}\n\n{notes}"
    publish("benchmarks.decompose", "Decomposition", body, bars, arguments.write)


if __name__ == "__main__":
    main()
