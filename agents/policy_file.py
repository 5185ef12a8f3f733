"""Reads and writes learned policies: arrays in policy.safetensors and their description in policy.json.

Never uses pickle. Refuses files that are truncated or changed, or that belong to another model, agent, episode or
ladder. Knows arrays and names; does not know agents or models.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from compression.refusal import Refusal
from compression.storage.strict_json import parse
from compression.storage.whole_files import replace_file

__all__ = ["ARRAYS", "DESCRIPTION", "SavedPolicy"]

DESCRIPTION = "policy.json"
ARRAYS = "policy.safetensors"

_FORMAT = 1
_KEYS = {"format", "agent", "subject", "target_kept", "steps", "rungs", "settings", "arrays_sha256"}
_LARGEST_HEADER = 1 << 20  # bytes of the description inside the file of arrays
_LARGEST = {DESCRIPTION: 1 << 20, ARRAYS: 1 << 24}  # bytes


@dataclass(frozen=True, eq=False)
class SavedPolicy:
    """A learned policy and its description.

    Attributes:
        agent: name of the agent that learned it, as in `agents.NAMES`.
        model: identity of the model whose schedules it proposes.
        target_kept: target at which it was learned; learning may continue at another target.
        steps: names of the groups that the steps of an episode decide about.
        rungs: offsets of the ladder, without dense.
        settings: settings of the agent that learned it, for readers only.
        arrays: parameters of the policy, floating point and finite.
    """

    agent: str
    model: str
    target_kept: float
    steps: tuple[str, ...]
    rungs: tuple[float, ...]
    settings: Mapping[str, float]
    arrays: Mapping[str, NDArray[Any]]

    @property
    def digest(self) -> str:
        """SHA-256 of the arrays as stored."""
        return hashlib.sha256(self._content()).hexdigest()

    def _content(self) -> bytes:
        return safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in self.arrays.items()})

    def write(self, folder: Path) -> None:
        """Writes both files into `folder`, the description last; after a crash each file is either whole or absent."""
        content = self._content()
        description = {
            "format": _FORMAT,
            "agent": self.agent,
            "subject": self.model,
            "target_kept": self.target_kept,
            "steps": self.steps,
            "rungs": self.rungs,
            "settings": dict(self.settings),
            "arrays_sha256": self.digest,
        }
        text = json.dumps(description, indent=2, allow_nan=False) + "\n"
        for name, data in ((ARRAYS, content), (DESCRIPTION, text.encode())):
            replace_file(folder / name, data)

    @classmethod
    def read(cls, folder: Path) -> SavedPolicy:
        """Reads the policy in `folder`, for example the folder of a finished run.

        Raises:
            ValueError: the files are missing, are not policy files, or are truncated or changed; one line.
        """
        try:
            content = {name: _bytes(folder / name) for name in (DESCRIPTION, ARRAYS)}
            return cls._parse(content[DESCRIPTION], content[ARRAYS])
        except OSError as error:
            reason = f"{Path(error.filename or folder).name}: {error.strerror}"
        except (ValueError, TypeError, SafetensorError) as error:
            reason = " ".join(str(error).split())
        raise Refusal(f"policy must be a folder with {DESCRIPTION} and {ARRAYS} of a run, got {folder}: {reason}")

    @classmethod
    def _parse(cls, description: bytes, content: bytes) -> SavedPolicy:
        fields = parse(description.decode("utf-8"))
        if not isinstance(fields, dict) or fields.get("format") != _FORMAT or set(fields) != _KEYS:
            raise Refusal(f"{DESCRIPTION} is not a policy of format {_FORMAT}")
        steps, rungs, settings = fields["steps"], fields["rungs"], fields["settings"]
        if not (
            all(isinstance(fields[name], str) for name in ("agent", "subject", "arrays_sha256"))
            and _numbers([fields["target_kept"]])
            and isinstance(steps, list)
            and all(isinstance(step, str) for step in steps)
            and isinstance(rungs, list)
            and _numbers(rungs)
            and isinstance(settings, dict)
            and _numbers(list(settings.values()))
        ):
            raise Refusal(f"{DESCRIPTION} has a field of the wrong type")
        if hashlib.sha256(content).hexdigest() != fields["arrays_sha256"]:
            raise Refusal(f"{ARRAYS} is truncated or does not belong to {DESCRIPTION}: its SHA-256 differs")
        if int.from_bytes(content[:8], "little") > _LARGEST_HEADER:
            raise Refusal(f"{ARRAYS} has a header of more than {_LARGEST_HEADER} bytes")
        arrays = safetensors.numpy.load(content)
        for name, array in arrays.items():
            if array.dtype not in (np.float32, np.float64) or not np.isfinite(array).all():
                raise Refusal(f"the array {name} does not hold finite floating-point numbers only")
        return cls(
            agent=fields["agent"],
            model=fields["subject"],
            target_kept=float(fields["target_kept"]),
            steps=tuple(steps),
            rungs=tuple(map(float, rungs)),
            settings=settings,
            arrays=arrays,
        )

    def check(self, agent: str, model: str) -> None:
        """Checks that the policy was learned by this agent on this model.

        Raises:
            ValueError: it was learned by another agent or on another model; one line.
        """
        if self.agent != agent:
            raise Refusal(f"the policy was learned by agent {self.agent} and cannot be continued by {agent}")
        if self.model != model:
            raise Refusal(
                f"the policy was learned on another model: {_short(self.model)}, not {_short(model)} as in this run"
            )

    def restore(
        self,
        agent: str,
        model: str,
        steps: Sequence[str],
        offsets: NDArray[np.float64],
        like: Mapping[str, NDArray[Any]],
    ) -> dict[str, NDArray[Any]]:
        """Returns the arrays, cast to the types in `like`.

        Args:
            agent: name of the agent that continues the policy.
            model: identity of the model of this run.
            steps: names of the problem's steps.
            offsets: offsets of the problem's levels, including dense, (levels,).
            like: arrays of a fresh policy, whose names, shapes and types are required.

        Raises:
            ValueError: the policy was learned by another agent, on another model, with other steps or another ladder,
                or with settings that give its arrays other shapes; one line.
        """
        self.check(agent, model)
        if self.steps != tuple(steps):
            pairs = zip((*self.steps, "none"), (*steps, "none"), strict=False)
            number, (there, here) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
            raise Refusal(
                f"the policy was learned on other steps, {len(self.steps)}, not {len(steps)} as in this run: "
                f"step {number} decides about {there} in the policy and about {here} in this run"
            )
        if not np.array_equal(self.rungs, offsets[:-1]):
            raise Refusal(
                f"the policy was learned on another ladder: {_ladder(self.rungs)}, not {_ladder(offsets[:-1])} "
                "as in this run"
            )
        shapes, wanted = ({name: a.shape for name, a in arrays.items()} for arrays in (self.arrays, like))
        if shapes != wanted:
            name = sorted(name for name in shapes | wanted if shapes.get(name) != wanted.get(name))[0]
            raise Refusal(
                f"the policy does not fit: its array {name} is {shapes.get(name, 'absent')}, "
                f"this agent needs {wanted.get(name, 'no such array')}"
            )
        return {name: array.astype(like[name].dtype) for name, array in self.arrays.items()}


def _bytes(path: Path) -> bytes:
    largest = _LARGEST[path.name]
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > largest:
            raise Refusal(f"{path.name} is larger than {largest} bytes")
        return file.read(largest)


def _numbers(values: Sequence[object]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _short(model: str) -> str:
    return model[:12] or "no name"


def _ladder(rungs: Sequence[float] | NDArray[np.float64]) -> str:
    return f"{len(rungs)} rungs from {rungs[0]:g} to {rungs[-1]:g}" if len(rungs) else "no rungs"
