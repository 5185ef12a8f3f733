"""Saves checkpoints, each complete or absent on disk, and loads the newest one whose checksum matches.

Knows safetensors and JSON files; does not know what they mean. The JSON file is written last and holds the sha256 of
the tensor file, so a crash at any point leaves the previous checkpoint intact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from compression.refusal import Refusal
from compression.storage.strict_json import bounded_text, json_digest
from compression.storage.tensor_files import new_tensor_file
from search.runtime.files import file_digest, write_whole
from search.runtime.signals import shield

__all__ = ["Checkpoint", "Checkpoints"]

_KEPT = 2
Taken = TypeVar("Taken")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state of a training at one step: tensors by name, and everything else as JSON values."""

    step: int
    tensors: Mapping[str, torch.Tensor]
    state: Mapping[str, Any]


class Checkpoints:
    """The newest two checkpoints of one training, in a folder that is created by the first `save`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, then remove all others except its predecessor; checkpoints of later steps are obsolete.

        Raises:
            OSError: the disk is full or not writable; earlier checkpoints stay as they are.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors, record = self._files(checkpoint.step)
        with shield():
            with new_tensor_file(tensors, checkpoint.tensors) as partial:
                digest = file_digest(partial)
                partial.replace(tensors)
            content = {"step": checkpoint.step, "sha256": digest, "state": dict(checkpoint.state)}
            plain = json.loads(json.dumps(content, allow_nan=False))
            write_whole(record, json.dumps({**plain, "digest": json_digest(plain)}))
            steps = self._steps()
            kept = [step for step in steps if step <= checkpoint.step][-_KEPT:]
            for step in set(steps).difference(kept):
                for path in reversed(self._files(step)):
                    path.unlink(missing_ok=True)

    def newest(
        self, take: Callable[[Checkpoint], Taken], tell: Callable[[str], None] = lambda text: None
    ) -> Taken | None:
        """Load the newest usable checkpoint and return the result of `take`; None if no checkpoint is usable.

        Args:
            take: uses a checkpoint; must raise ValueError and change nothing if the checkpoint does not fit.
            tell: called with one line for every checkpoint that is damaged or that `take` refused.
        """
        for step in reversed(self._steps()):
            tensors, record = self._files(step)
            try:
                content = json.loads(bounded_text(record, "the checkpoint"))
                own = content.pop("digest", None)  # earlier versions wrote none
                if own not in (None, json_digest(content)):
                    raise Refusal("its record was changed")
                if content["step"] != step or file_digest(tensors) != content["sha256"]:
                    raise Refusal("its checksum differs")
                return take(Checkpoint(step, load_file(tensors), content["state"]))
            except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                tell(f"checkpoint {record.name} cannot be used ({reason}); trying the previous one")
        return None

    def _steps(self) -> list[int]:
        """Return the steps of all checkpoints in ascending order."""
        names = (path.stem.removeprefix("step-") for path in self.folder.glob("step-*.json"))
        return sorted(int(name) for name in names if name.isdigit())

    def _files(self, step: int) -> tuple[Path, Path]:
        stem = self.folder / f"step-{step:08d}"
        return stem.with_suffix(".safetensors"), stem.with_suffix(".json")
