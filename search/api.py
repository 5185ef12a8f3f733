"""Chisel from Python: what the commands do, as functions, and finished runs as pandas data frames.

    from search import api

    found = api.run(agent="reinforce", budget=200)
    found.table()                       # dense, uniform, closed form, searched, repaired, healed
    api.export(found.folder, "small")   # a folder for transformers

Input that is refused raises `Refusal` with one line; data or a model that cannot be had raises `DataUnavailable`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compression.refusal import Refusal
from search.comparison import contest
from search.config import Config
from search.export.restore import RestoredRun
from search.export.restore import restore as _restore
from search.export.run import ExportForm, export_run
from search.healing.plan import HealingOptions
from search.healing.run import HealedRun, heal_folder
from search.pipeline.finish import finish
from search.pipeline.run import run as _run
from search.profiling import sweep
from search.reporting.opened_run import OpenedRun
from search.runtime.console import Console
from search.runtime.errors import DataUnavailable

__all__ = [
    "Config",
    "DataUnavailable",
    "ExportForm",
    "HealedRun",
    "HealingOptions",
    "OpenedRun",
    "Refusal",
    "RestoredRun",
    "compare",
    "export",
    "heal",
    "open_run",
    "profile",
    "restore",
    "run",
]


def run(*, quiet: bool = False, **fields: Any) -> OpenedRun:
    """Run the whole job: search, table, repair, healing, benchmarks and export, as `python search.py` does.

    Args:
        quiet: print no progress to standard error.
        fields: fields of `Config`, named as the flags with underscores (`target_kept=0.7`); others keep their defaults.

    Returns:
        The finished run; its folder is `out`, or a new one below results/.

    Raises:
        Refusal: a field out of range, or input that does not fit the model.
        DataUnavailable: the model or a data package cannot be had.
    """
    with _console(quiet) as console:
        summary = _run(Config.of(fields), console)
        finish(summary.folder, summary.experiment, console)
    if summary.fault is not None:
        raise summary.fault
    return OpenedRun.of(summary.folder)


def profile(
    chi: Sequence[int] | None = None,
    fractions: Sequence[float] | None = None,
    *,
    tokens: int | None = None,
    context: int | None = None,
    quiet: bool = False,
    **fields: Any,
) -> OpenedRun:
    """Measure the KL that every site costs by itself at several χ, all other sites dense.

    Args:
        chi: bond dimensions, each at least 1; with `fractions` None too, those of the resumed sweep or the defaults.
        fractions: shares of a site's full χ, each between 0 and 1.
        tokens: tokens of text that one measurement reads at most, at least 64; None takes the default.
        context: measure only the sites that fill the KV cache, on one text of so many tokens, at least 64.
        fields: as for `run`.

    Returns:
        The finished sweep; see `OpenedRun.sensitivity`.

    Raises:
        Refusal, DataUnavailable: as `run`.
    """
    levels = None
    if chi is not None or fractions is not None:
        levels = sweep.Levels(
            sweep.CHI if chi is None else tuple(chi), sweep.FRACTIONS if fractions is None else tuple(fractions)
        )
    with _console(quiet) as console:
        folder, _ = sweep.profile(Config.of(fields), levels, tokens, console, context)
    return OpenedRun.of(folder)


def compare(agents: Sequence[str], seeds: Sequence[int] = (0,), *, quiet: bool = False, **fields: Any) -> OpenedRun:
    """Let several agents search with equal budgets, and compare what they find on held-out text.

    Args:
        agents: names as in `agents.NAMES`, or module:Class.
        seeds: seeds of the agents; each agent searches once per seed.
        fields: as for `run`; the budget holds for every search.

    Returns:
        The finished comparison; see `OpenedRun.standings`. Its table.md and curve.svg show it.

    Raises:
        Refusal, DataUnavailable: as `run`; an unknown agent or a seed given twice.
    """
    with _console(quiet) as console:
        folder, _ = contest.compare(Config.of(fields), agents, seeds, console)
    return OpenedRun.of(folder)


def heal(run: str | Path, options: HealingOptions | None = None, *, quiet: bool = False) -> HealedRun:
    """Train the compressed model of a finished run towards the dense one; an interrupted healing continues.

    Args:
        run: folder of the run.
        options: length, text and learning rate; None heals for 30 minutes on the text of the default job.

    Returns:
        The table before and after, and the folder of the weights.

    Raises:
        Refusal, DataUnavailable: no finished run, an option out of range, or text that cannot be had.
    """
    with _console(quiet) as console:
        return heal_folder(Path(run), options or HealingOptions(), console)


def restore(
    run: str | Path,
    state: str | None = None,
    *,
    healed: str | Path | None = None,
    device: str = "auto",
    trusted: bool = False,
    quiet: bool = False,
) -> RestoredRun:
    """Load the compressed model of a finished run into memory: `restore(folder).experiment.loaded.model`.

    Args:
        run: folder of the run.
        state: "searched", "repaired" or "healed"; None takes the last one that the run has.
        healed: folder of a healing, such as `HealedRun.folder`; None takes that of the run itself.
        device: "auto", "cpu", "cuda" or "cuda:n".
        trusted: run the code that comes with the model, if the run used it.

    Raises:
        Refusal, DataUnavailable: no finished run, another model than the run's, or a state that it does not have.
    """
    with _console(quiet) as console:
        own = None if healed is None else Path(healed)
        return _restore(Path(run), console, device, state, own, trusted=trusted)


def export(
    run: str | Path,
    folder: str | Path,
    form: ExportForm | None = None,
    *,
    healed: str | Path | None = None,
    quiet: bool = False,
) -> Path:
    """Write the compressed model of a finished run as a folder that other programs load.

    Args:
        run: folder of the run.
        folder: where to; must not exist, or be empty.
        form: what is written; None writes the small folder for transformers in bfloat16.
        healed: as for `restore`.

    Returns:
        `folder`.

    Raises:
        Refusal, DataUnavailable: as `restore`; a folder in use, or a form that the model cannot take.
    """
    with _console(quiet) as console:
        export_run(Path(run), Path(folder), form or ExportForm(), console, None if healed is None else Path(healed))
    return Path(folder)


def open_run(path: str | Path) -> OpenedRun:
    """The tables of a finished run, sweep or comparison as pandas data frames. Loads no model.

    Raises:
        Refusal: a folder that no command of this project has written.
    """
    return OpenedRun.of(Path(path))


def _console(quiet: bool) -> Console:
    return Console(quiet=quiet)
