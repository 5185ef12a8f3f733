"""The healed state: what a healing leaves in its folder, and how it becomes a model again.

All stored tensors of the sites and every vector of the model as safetensors, and a JSON file with what they belong to
and how they came about, written last. Knows nothing of training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from compression.layers.rebuild import rebuilt
from compression.refusal import Refusal
from compression.schedule import Schedule
from compression.sites import Site, put_modules
from compression.storage.strict_json import read_object
from compression.storage.tensor_files import new_tensor_file
from compression.training.trainable import put_parameters
from search.runtime.files import file_digest, finite, write_whole

__all__ = ["HEALED", "REPAIR", "REPAIRED", "STATE", "StoredWeights", "load_sites_", "site_tensors", "write_weights"]

HEALED = "healed"
"""Folder of the healed state inside a run folder."""

STATE = "healing.json"
"""The file of a finished healing that describes its weights."""
REPAIRED = "repaired"
"""The folder of a run that holds the repaired weights of its schedule, if repair was kept."""
REPAIR = "repair.json"
"""The file there that describes them."""

_WEIGHTS = "weights.safetensors"
_FORMAT, _VERSION = "chisel-healed", 1
_LARGEST_FILE = 1 << 26  # bytes of the JSON file


@dataclass(frozen=True, eq=False)
class StoredWeights:
    """Weights that a stage of a run keeps: of its compressed sites, and all norms and biases.

    Attributes:
        document: the content of healing.json or repair.json: what the weights belong to and how they were made.
        tensors: by qualified name.
    """

    document: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def read(cls, folder: Path, name: str = STATE) -> StoredWeights:
        """Raises ValueError, one line, for a folder without one, another version, or files that were cut or changed."""
        if not (folder / name).is_file():
            raise Refusal(f"there is no finished healing in {folder}: {name} is missing")
        document = read_object(folder / name, "the healed state", _LARGEST_FILE)
        try:
            version = document.get("version")
            if document.get("format") != _FORMAT or type(version) is not int or not 1 <= version <= _VERSION:
                raise Refusal(f"it must be {_FORMAT} of version 1 to {_VERSION}")
            if file_digest(folder / _WEIGHTS) != document.get("sha256"):
                raise Refusal(f"the checksum of {_WEIGHTS} differs")
            return cls(document, load_file(folder / _WEIGHTS))
        except (OSError, ValueError, SafetensorError) as error:
            raise Refusal(f"cannot use the healed state {folder}: {error}") from None

    def check(self, schedule: Schedule, model_digest: str) -> None:
        """Raises ValueError if it is of another schedule or model."""
        for what, own, wanted in (
            ("schedule", self.document.get("schedule"), json.loads(schedule.to_json())),
            ("model", self.document.get("model", {}).get("digest"), model_digest),
        ):
            if own != wanted:
                raise Refusal(f"the healed state is of another {what} than the run")

    def put_(self, model: nn.Module, sites: Sequence[Site], schedule: Schedule) -> Callable[[], None]:
        """Make a dense model the healed one; returns what makes it dense again.

        Raises:
            ValueError: tensors that do not fit.
        """
        wanted = [site for site in sites if not site.dense_because]
        taken = load_sites_(model, wanted, schedule, self.tensors)
        inside = tuple(f"{site.name}." for site in wanted)
        known = dict(model.named_parameters())
        vectors = {}
        for name, value in self.tensors.items():
            if not name.startswith(inside):
                if name not in known or known[name].shape != value.shape:
                    raise Refusal(f"the healed state has {name} of shape {tuple(value.shape)}, the model has not")
                vectors[name] = nn.Parameter(value.to(known[name]), requires_grad=False)
        before = put_parameters(model, vectors)

        def undo() -> None:
            put_modules(model, taken)
            put_parameters(model, before)

        return undo


def write_weights(
    folder: Path, name: str, model: nn.Module, sites: Sequence[Site], document: Mapping[str, Any]
) -> None:
    """Write the compressed sites, norms and biases of `model`, and last the file `name` with `document`.

    Raises:
        OSError: the disk is full or not writable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = site_tensors(model, [site for site in sites if not site.dense_because])
    vectors = {name: p.detach() for name, p in model.named_parameters() if p.ndim == 1 and name not in tensors}
    tensors |= {name: value.clone() for name, value in vectors.items()}
    with new_tensor_file(folder / f"{_WEIGHTS}.partial", tensors) as partial:
        content = {"format": _FORMAT, "version": _VERSION, "sha256": file_digest(partial), **document}
        partial.replace(folder / _WEIGHTS)
    write_whole(folder / name, json.dumps(finite(content), indent=2, ensure_ascii=False) + "\n")


def site_tensors(model: nn.Module, sites: Sequence[Site]) -> dict[str, torch.Tensor]:
    """Everything that is stored of these sites, by qualified name."""
    return {
        f"{site.name}.{key}": value.detach().contiguous().clone()
        for site in sites
        for key, value in model.get_submodule(site.name).state_dict().items()
    }


def load_sites_(
    model: nn.Module, sites: Sequence[Site], schedule: Schedule, tensors: Mapping[str, torch.Tensor]
) -> dict[str, nn.Module]:
    """Put layers with these stored tensors, as numbers of the model's type, in the places of the sites.

    Returns:
        The modules taken out, by site name.

    Raises:
        ValueError: tensors that do not fit the schedule; the model is then unchanged.
    """
    taken: dict[str, nn.Module] = {}
    fresh: dict[str, nn.Module] = {}
    for site in sites:
        prefix = f"{site.name}."
        state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        taken[site.name] = model.get_submodule(site.name)
        if ("bias" in state) != (taken[site.name].bias is not None):
            raise Refusal(f"stored tensors do not fit {site.name}: its bias is missing, or it has none")
        layer = rebuilt(schedule[site.name], site.out_features, site.in_features, state)
        old = next(taken[site.name].parameters())
        fresh[site.name] = layer.to(old.device, old.dtype)
    put_modules(model, fresh)
    return taken
