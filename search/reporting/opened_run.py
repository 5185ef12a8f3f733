"""A run folder opened for reading: its tables as pandas data frames. Knows file names; loads no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compression.refusal import Refusal
from compression.storage.strict_json import read_object
from search.reporting.documents import ContestFile, HealingFile, PriorFile, SummaryFile, document
from search.reporting.frames import frame_of, read_frame
from search.runtime.run_digest import refuse_changed
from search.runtime.run_folder import CONFIG, PRIOR, STAGES, SUMMARY, TRIALS
from search.runtime.schema import Part

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["BENCHMARKS", "CONTEST", "SENSITIVITY", "OpenedRun"]

BENCHMARKS, SENSITIVITY, CONTEST = "benchmarks.csv", "sensitivity.csv", "contest.json"


@dataclass(frozen=True)
class OpenedRun:
    """The folder of a search, a sweep (`profile`) or a comparison (`compare`).

    Every method raises a one-line Refusal if the run has no such table or if a file is damaged.

    Attributes:
        folder: path of the folder.
    """

    folder: Path

    @classmethod
    def of(cls, folder: Path) -> OpenedRun:
        """Open a folder.

        Raises:
            Refusal: no command of this project has written the folder, or a finished run was changed since.
        """
        if not (folder / CONFIG).is_file():
            raise Refusal(f"a run, a sweep or a comparison has a {CONFIG}, and {folder} has none")
        if (folder / PRIOR).is_file():
            refuse_changed(folder)
        return cls(folder)

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration: everything that defines the run."""
        return read_object(self.folder / CONFIG, "the configuration")

    @property
    def summary(self) -> Mapping[str, Any]:
        """The content of summary.json: the final table, differences with intervals, latency and provenance."""
        return self._document(SummaryFile, SUMMARY, "the summary", "finish the run with --resume")

    @property
    def prior(self) -> Mapping[str, Any]:
        """The content of prior.json: the searched schedule with its sensitivity traces and scores."""
        return self._document(PriorFile, PRIOR, "the prior", "finish the run with --resume")

    def table(self) -> pd.DataFrame:
        """The final table: one row per schedule (dense, uniform, closed form, searched, repaired, healed).

        KL is in nats per token, sizes in parameters and bytes, prefill and decode in times relative to the dense model.
        """
        return frame_of(self.summary.get("rows", []))

    def trials(self) -> pd.DataFrame:
        """One row per trial in the order of evaluation: state, reward, seconds, scores, and the level of each step."""
        return self._frame(TRIALS, "a search of --budget 1 or more writes it")

    def stages(self) -> pd.DataFrame:
        """One row per stage: name and seconds, those of earlier sessions of the run included."""
        return self._frame(STAGES, "a search writes it")

    def sensitivity(self) -> pd.DataFrame:
        """One row per site and χ with all other sites dense, of a sweep: predicted and measured KL, kept fraction."""
        return self._frame(SENSITIVITY, "search.py profile writes it")

    def benchmarks(self) -> pd.DataFrame:
        """One row per model and task: metric, value, standard error, items."""
        return self._frame(BENCHMARKS, "search.py benchmark writes it")

    def schedule(self) -> pd.DataFrame:
        """One row per site of the searched schedule: block, family, shape, topology, χ, parameters, kept fraction.

        Where the schedule cuts bonds between matrices, `width` and `groups` are the kept and all groups of a site's
        bond; they are missing at a site that no bond cuts.
        """
        import pandas as pd

        sites = frame_of(self.prior.get("sites", [])).drop(columns="sensitivity", errors="ignore")
        sites["kept_fraction"] = sites["parameters"] / sites["shape"].map(lambda shape: shape[0] * shape[1])
        if "bonds" in sites:
            bonds = sites.pop("bonds")
            for field in ("width", "groups"):
                sites[field] = pd.array([of[0][field] if isinstance(of, list) else None for of in bonds], dtype="Int64")
        return sites

    def standings(self) -> pd.DataFrame:
        """One row per agent, seed and part of the budget: the held-out KL of what the agent then recommends.

        Columns: agent, seed, evaluations, kl in nats per token, and closed_form_kl, the same for all rows.
        """
        contest = self._document(ContestFile, CONTEST, "the comparison", "search.py compare writes it")
        heldout = {digest: measured.get("kl") for digest, measured in contest["heldout"].items()}
        rows = [
            {
                "agent": entry["agent"],
                "seed": entry["seed"],
                "evaluations": mark["evaluations"],
                "kl": heldout.get(mark["digest"]),
                "closed_form_kl": heldout.get(contest["closed_form"]),
            }
            for entry in contest["entries"]
            for mark in entry["marks"]
        ]
        return frame_of(rows)

    def healing(self, name: str = "healed") -> pd.DataFrame:
        """One row per measurement of a healing: tokens learned, seconds, KL in nats per token and perplexity.

        Args:
            name: folder of the healing inside the run; the job's own by default.
        """
        found = self._document(HealingFile, f"{name}/healing.json", "the healing", "search.py heal writes it")
        return frame_of(found["looks"])

    def _document(self, schema: type[Part], name: str, what: str, hint: str) -> Mapping[str, Any]:
        self._refuse_missing(name, hint)
        return document(schema, self.folder / name, what)

    def _frame(self, name: str, hint: str) -> pd.DataFrame:
        self._refuse_missing(name, hint)
        return read_frame(self.folder / name)

    def _refuse_missing(self, name: str, hint: str) -> None:
        if not (self.folder / name).is_file():
            raise Refusal(f"there is no {self.folder / name}; {hint}")
