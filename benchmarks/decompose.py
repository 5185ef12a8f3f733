"""Compares speed, error and memory of decomposition with tensorly and quimb, for all χ up to a cap at once.

    python -m benchmarks.decompose [--quick] [--write] [--measured FILE [--minutes M]] [--peer-seconds S] [--largest M]

The peers are not dependencies of Chisel: pip install tensorly quimb

Each measurement is one process. It makes the matrix, warms up on a small matrix, decomposes the matrix once, and
reports the seconds of that call, the true relative error ‖W − left·right‖_F / ‖W‖_F (with the full spectrum: over every
16th row), and the growth of its resident memory from before the matrix was made, so the matrix itself counts. Processes
of Chisel and of the peers alternate. A randomized method of a peer gets the fewest power iterations that bring its
error within 0.5 % of the optimum.

There are two kinds of matrices: `power` has singular values that fall as i^-½ (a Gaussian matrix with scaled rows,
mixed by a reflection). `flat` is a Gaussian matrix, whose singular values span only a factor of 4; this is the hard
case for iterations.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import inf, isinf, nan, sqrt
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.memory import peak_resident
from benchmarks.report import Bar, markdown, publish
from compression import decompose, resolve

CHIS, QUICK_CHIS = (64, 512), (16, 128)  # 1/64 and 1/8 of the smaller side
ITERATIONS = (2, 3, 4, 6)
TOLERANCE = 0.005  # relative difference from the optimum within which errors count as equal
RANDOMIZED = ("tensorly randomized", "quimb svd:rand")


@dataclass(frozen=True)
class Case:
    """One call to measure; χ 0 means the full spectrum, and 0 iterations that the method has none."""

    contender: str
    rows: int
    columns: int
    spectrum: str
    chi: int
    iterations: int = 0
    repeat: int = 0


@dataclass(frozen=True)
class Measured:
    """Seconds of the call (infinite if it was cut off), relative error by χ, and peak memory over the matrix's size."""

    seconds: float
    errors: dict[str, float]
    memory: float

    def error(self, chi: int) -> float:
        """Relative error at one χ, or with the full spectrum for χ 0; NaN if it was not measured."""
        return self.errors.get(str(chi), nan)


def matrix(rows: int, columns: int, spectrum: str) -> torch.Tensor:
    """Makes the same float32 matrix at every call, in place, so that making it does not set the memory peak."""
    generator = torch.Generator().manual_seed(0)
    result = torch.empty(rows, columns)
    for row in result:
        row.normal_(generator=generator)
    if spectrum == "power":
        result.mul_(torch.arange(1, rows + 1).pow(-0.5)[:, None])
    direction = torch.nn.functional.normalize(torch.randn(rows, generator=generator), dim=0)
    return result.addr_(direction, direction @ result, alpha=-2)


def call(case: Case) -> Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]:
    """Returns the contender as a function from a matrix and χ to the left and right factors."""
    if case.contender == "chisel":

        def chisel(weight: torch.Tensor, chi: int) -> tuple[torch.Tensor, torch.Tensor]:
            cores, _ = decompose(weight, resolve("lowrank", *weight.shape), chi)
            return cores[0][0, :, 0], cores[1][:, 0, :, 0]

        return chisel
    if case.contender.startswith("tensorly"):
        from tensorly.decomposition import tensor_train
        from tensorly.tenalg.svd import svd_interface

        def tensorly(weight: torch.Tensor, chi: int) -> tuple[torch.Tensor, torch.Tensor]:
            if case.iterations:  # like tensor_train(svd="randomized_svd"), which does not let us set n_iter
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
    """Measures one case once in this process."""
    decomposition = call(case)
    decomposition(matrix(96, 128, "flat"), 16)
    before = peak_resident()
    weight = matrix(case.rows, case.columns, case.spectrum)
    start = time.perf_counter()
    left, right = decomposition(weight, case.chi or min(case.rows, case.columns))
    seconds = time.perf_counter() - start
    peak = peak_resident()
    errors = {str(chi): error(weight, left[:, :chi], right[:chi]) for chi in {*CHIS, *QUICK_CHIS} if chi <= len(right)}
    if case.chi == 0:
        errors["0"] = error(weight[::16], left[::16], right)
    return Measured(seconds, errors, (peak - before) / weight.nbytes)


def error(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> float:
    """Returns ‖W − left·right‖_F / ‖W‖_F, computed in blocks of rows."""
    squared, total, step = 0.0, 0.0, 512
    for row in range(0, weight.shape[0], step):
        part = weight[row : row + step]
        squared += float((part - left[row : row + step] @ right).double().square().sum())
        total += float(part.double().square().sum())
    return sqrt(squared / total)


class Laboratory:
    """Makes each measurement in its own process, or takes it from the file of an earlier run.

    Args:
        file: file that keeps the measurements, so that a long run can be made in pieces; None keeps none.
        peer_seconds: time limit for a peer's process, in seconds.
        minutes: no measurement is started after this many minutes.
    """

    def __init__(self, file: Path | None, peer_seconds: float, minutes: float) -> None:
        self._file = file
        self._end = time.monotonic() + 60 * minutes
        self._limit = peer_seconds
        lines = file.read_text(encoding="utf-8").splitlines() if file is not None and file.exists() else []
        self._known = {Case(**case): Measured(**result) for case, result in map(json.loads, lines)}

    def of(self, case: Case) -> Measured:
        """Returns the result of one case.

        Raises:
            RuntimeError: the measuring process failed.
            SystemExit: the minutes are over.
        """
        if case not in self._known:
            if time.monotonic() > self._end:
                raise SystemExit("the --minutes are over; run the same command again to continue from --measured")
            command = [sys.executable, "-m", "benchmarks.decompose", "--case", json.dumps(asdict(case))]
            limit = None if case.contender == "chisel" else self._limit
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=True)
                self._known[case] = Measured(**json.loads(done.stdout.splitlines()[-1]))
            except subprocess.TimeoutExpired:
                self._known[case] = Measured(inf, {}, nan)
            except subprocess.CalledProcessError as error:
                raise RuntimeError(f"{case}: {error.stderr[-500:]}") from error
            print(case, self._known[case], file=sys.stderr, flush=True)
            if self._file is not None:
                with self._file.open("a", encoding="utf-8") as handle:
                    handle.write(json.dumps([asdict(case), asdict(self._known[case])]) + "\n")
        return self._known[case]

    def median(self, cases: Sequence[Case]) -> Measured:
        """Combines repeats: median of the seconds, errors of the first repeat, and largest memory."""
        results = [self.of(case) for case in cases]
        seconds, memory = median(result.seconds for result in results), max(result.memory for result in results)
        return Measured(seconds, results[0].errors, memory)


@dataclass(frozen=True)
class Comparison:
    """One χ on one matrix, with the contenders that Chisel is compared with."""

    rows: int
    columns: int
    spectrum: str
    chi: int
    others: tuple[str, ...]
    repeats: int = 1

    def run(self, laboratory: Laboratory, enough: dict[tuple[str, str, int], int]) -> dict[str, tuple[Measured, int]]:
        """Returns the result and the power iterations of every contender; their processes alternate.

        Args:
            laboratory: makes the measurements.
            enough: power iterations that a contender needed for a spectrum and χ on the previous shape; updated.
        """
        settings = dict.fromkeys(("chisel", *self.others), 0)
        best = laboratory.of(self._case("chisel", 0, 0)).error(self.chi)
        for contender in [name for name in self.others if name in RANDOMIZED]:
            key = (contender, self.spectrum, self.chi)
            for iterations in [each for each in ITERATIONS if each >= enough.get(key, 0)]:
                settings[contender] = enough[key] = iterations
                result = laboratory.of(self._case(contender, iterations, 0))
                if not result.error(self.chi) > best * (1 + TOLERANCE):
                    break
        for repeat in range(self.repeats):
            for contender, iterations in settings.items():
                laboratory.of(self._case(contender, iterations, repeat))
        return {
            contender: (
                laboratory.median([self._case(contender, iterations, repeat) for repeat in range(self.repeats)]),
                iterations,
            )
            for contender, iterations in settings.items()
        }

    def _case(self, contender: str, iterations: int, repeat: int) -> Case:
        # A default SVD computes the whole spectrum and truncates it, so one measurement serves every χ.
        chi = 0 if contender.endswith(" svd") else self.chi
        return Case(contender, self.rows, self.columns, self.spectrum, chi, iterations, repeat)


@dataclass
class Findings:
    """Rows of the table and the ratios for the bars, over all comparisons.

    Attributes:
        rows: rows of the table.
        over_default: times of the peers' default SVD over ours, at capped χ.
        over_best: times of all peer methods over ours, at capped χ.
        over_default_full: times of the peers' default SVD over ours, for the full spectrum.
        memory: our memory over that of the matrix.
    """

    rows: list[list[object]]
    over_default: list[float]
    over_best: list[float]
    over_default_full: list[float]
    memory: list[float]

    def add(self, comparison: Comparison, results: dict[str, tuple[Measured, int]], limit: float) -> None:
        """Adds one comparison; a peer that was cut off counts with `limit` seconds, a lower bound."""
        ours, chi = results["chisel"][0], comparison.chi
        self.memory.append(ours.memory)
        optimum = min(result.error(chi) for result, _ in results.values() if not isinf(result.seconds))
        for name, (result, iterations) in results.items():
            ended = isinf(result.seconds)
            # With the full spectrum only rounding errors remain, hence the absolute term.
            equal = ended or result.error(chi) <= optimum * (1 + TOLERANCE) + 1e-5
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
                    f"{comparison.rows} × {comparison.columns}",
                    comparison.spectrum,
                    chi or "all",
                    f"> {limit:g}" if ended else f"{result.seconds:.2f}",
                    "" if ended else f"{result.error(chi):.5f}",
                    "" if ended else f"{result.memory:.1f}",
                    "" if name == "chisel" else f"{'> ' if ended else ''}{ratio:.1f}",
                ]
            )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Compare decomposition speed with tensorly and quimb.")
    parser.add_argument("--quick", action="store_true", help="use one smaller matrix")
    parser.add_argument("--write", action="store_true", help="write results/decompose.md")
    parser.add_argument("--measured", type=Path, help="keep measurements in this file and reuse those in it")
    parser.add_argument("--peer-seconds", type=float, default=240, help="time limit of a peer, s (default: 240)")
    parser.add_argument("--largest", type=int, default=8192, help="leave out matrices with more rows (default: 8192)")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after this time; continue with --measured")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(asdict(measure(Case(**json.loads(arguments.case))))))
        return
    if missing := [name for name in ("tensorly", "quimb") if importlib.util.find_spec(name) is None]:
        raise SystemExit(f"the peers {' and '.join(missing)} are not installed; run: pip install tensorly quimb")
    laboratory = Laboratory(arguments.measured, arguments.peer_seconds, arguments.minutes)
    svd, best = ("tensorly svd", "quimb svd"), ("quimb svd:eig", *RANDOMIZED)
    if arguments.quick:
        low, high = QUICK_CHIS
        comparisons = [
            Comparison(1024, 2752, spectrum, chi, others, repeats=3)
            for spectrum in ("power", "flat")
            for chi, others in ((low, (*svd, *RANDOMIZED)), (high, (*svd, *best)), (0, (*svd, "quimb svd:eig")))
        ]
    else:
        low, high = CHIS
        comparisons = [
            Comparison(4096, 11008, "power", high, (*svd, *best)),
            Comparison(4096, 11008, "power", 0, (*svd, "quimb svd:eig")),
            Comparison(4096, 11008, "power", low, (*svd, *RANDOMIZED)),
            Comparison(8192, 28672, "power", high, svd[1:]),
            Comparison(4096, 11008, "flat", high, best),  # the time of a default SVD does not depend on the spectrum
            Comparison(8192, 28672, "power", 0, svd[1:]),
        ]
    findings, enough = Findings([], [], [], [], []), {}
    for comparison in [each for each in comparisons if each.rows <= arguments.largest]:
        findings.add(comparison, comparison.run(laboratory, enough), arguments.peer_seconds)
    header = ["method", "matrix", "spectrum", "χ up to", "seconds", "relative error", "memory / matrix", "times ours"]
    notes = (
        "One decomposition serves all χ up to the cap. The relative error ‖W − left·right‖ / ‖W‖ is measured; errors "
        f"within {100 * TOLERANCE:g} % of the smallest count as equal. `svd` is the peers' default, which computes the "
        "whole spectrum whatever the cap; `svd:eig` and the randomized methods are the best that they offer, with the "
        f"fewest power iterations out of {', '.join(map(str, ITERATIONS))} that reach equal error. tensorly's "
        "`symeig_svd` forms the Gram matrix of the larger side and is left out. Memory is the peak of the process "
        "minus its memory before the matrix was made, so it includes the matrix. Spectra: `power` falls as i^-½, "
        "`flat` is Gaussian."
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
