"""Store the weights of a healed or repaired model, and load them back into the dense model.

A safetensors file holds all stored tensors of the sites, every vector (norm or bias) and every router of the model. A
JSON file, written last, says what the weights belong to and how they were made. Does not know training.
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
from compression.sites import Site, dense_weight, put_modules, router_weights
from compression.storage.strict_json import json_digest, read_object
from compression.storage.tensor_files import new_tensor_file
from compression.training.trainable import put_parameters
from search.runtime.files import file_digest, finite, write_whole
from search.runtime.remembered import remembered_digest

__all__ = ["HEALED", "REPAIR", "REPAIRED", "STATE", "StoredWeights", "load_sites_", "site_tensors", "write_weights"]

HEALED = "healed"
"""Folder of the healed weights inside a run folder."""

STATE = "healing.json"
"""The file of a finished healing that describes its weights."""
REPAIRED = "repaired"
"""Folder inside a run folder of the repaired weights of its schedule; absent if repair was discarded."""
REPAIR = "repair.json"
"""The file in that folder that describes the repaired weights."""

_WEIGHTS = "weights.safetensors"
_FORMAT, _VERSION = (
    "chisel-healed",
    4,
)  # version 1 holds no cut matrices, version 2 no pruned ones, version 3 no rounded ones


@dataclass(frozen=True, eq=False)
class StoredWeights:
    """Stored weights of a healed or repaired model: its compressed sites and all its norms, biases and routers.

    Attributes:
        document: the content of healing.json or repair.json: what the weights belong to and how they were made.
        tensors: the weights by qualified name.
    """

    document: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def read(cls, folder: Path, name: str = STATE) -> StoredWeights:
        """Read the weights that the file `name` in `folder` describes.

        Raises:
            ValueError: the file is missing or of another version, or a file was truncated or changed.
        """
        if not (folder / name).is_file():
            raise Refusal(f"there is no finished healing in {folder}: {name} is missing")
        document = read_object(folder / name, "the healed state")
        try:
            version = document.get("version")
            if document.get("format") != _FORMAT or type(version) is not int or not 1 <= version <= _VERSION:
                raise Refusal(f"it must be {_FORMAT} of version 1 to {_VERSION}")
            if document.get("digest") not in (None, _own_digest(document)):  # earlier versions wrote none
                raise Refusal(f"{name} was changed: its digest differs")
            if remembered_digest(folder / _WEIGHTS) != document.get("sha256"):
                raise Refusal(f"the checksum of {_WEIGHTS} differs")
            return cls(document, load_file(folder / _WEIGHTS))
        except (OSError, ValueError, SafetensorError) as error:
            raise Refusal(f"cannot use the healed state {folder}: {error}") from None

    def check(self, schedule: Schedule, model_digest: str) -> None:
        """Check that the weights belong to this schedule and model.

        Raises:
            ValueError: they belong to another schedule or model.
        """
        for what, own, wanted in (
            ("schedule", self.document.get("schedule"), json.loads(schedule.to_json())),
            ("model", self.document.get("model", {}).get("digest"), model_digest),
        ):
            if own != wanted:
                raise Refusal(f"the healed state belongs to another {what} than the run")

    def put_(self, model: nn.Module, sites: Sequence[Site], schedule: Schedule) -> Callable[[], None]:
        """Put the stored weights into a dense model; returns a function that makes the model dense again.

        Raises:
            ValueError: a tensor does not fit the model.
        """
        wanted = [site for site in sites if not site.dense_because]
        taken = load_sites_(model, wanted, schedule, self.tensors)
        inside = tuple(f"{site.name}." for site in wanted)
        known = dict(model.named_parameters())
        vectors = {}
        for name, value in self.tensors.items():
            if not name.startswith(inside):
                if name not in known or known[name].shape != value.shape:
                    raise Refusal(f"the healed state has {name} of shape {tuple(value.shape)}, but the model does not")
                vectors[name] = nn.Parameter(value.to(known[name]), requires_grad=False)
        before = put_parameters(model, vectors)

        def undo() -> None:
            put_modules(model, taken)
            put_parameters(model, before)

        return undo


def write_weights(
    folder: Path, name: str, model: nn.Module, sites: Sequence[Site], document: Mapping[str, Any]
) -> None:
    """Write the compressed sites, norms, biases and routers of `model`, then the file `name` with `document`.

    Raises:
        OSError: the disk is full or not writable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = site_tensors(model, [site for site in sites if not site.dense_because])
    routers = router_weights(model)
    vectors = {
        name: p.detach()
        for name, p in model.named_parameters()
        if (p.ndim == 1 or name in routers) and name not in tensors
    }
    tensors |= {name: value.clone() for name, value in vectors.items()}
    with new_tensor_file(folder / _WEIGHTS, tensors) as partial:
        content = {"format": _FORMAT, "version": _VERSION, "sha256": file_digest(partial), **document}
        partial.replace(folder / _WEIGHTS)
    plain = json.loads(json.dumps(finite(content)))
    plain["digest"] = _own_digest(plain)
    write_whole(folder / name, json.dumps(plain, indent=2, ensure_ascii=False) + "\n")


def _own_digest(document: Mapping[str, Any]) -> str:
    """The digest of everything else in healing.json or repair.json."""
    return json_digest({name: value for name, value in document.items() if name != "digest"})


def site_tensors(model: nn.Module, sites: Sequence[Site]) -> dict[str, torch.Tensor]:
    """Copies of all stored tensors of these sites, by qualified name; a plain matrix as (out, in), however stored."""
    tensors = {}
    for site in sites:
        module = model.get_submodule(site.name)
        for key, value in module.state_dict().items():
            found = dense_weight(module) if key == "weight" else value
            tensors[f"{site.name}.{key}"] = found.detach().contiguous().clone()
    return tensors


def load_sites_(
    model: nn.Module, sites: Sequence[Site], schedule: Schedule, tensors: Mapping[str, torch.Tensor]
) -> dict[str, nn.Module]:
    """Replace the sites by layers with these stored tensors, converted to the dtype and device of the model.

    Returns:
        The replaced modules, by site name.

    Raises:
        ValueError: a tensor does not fit the schedule; the model is then unchanged.
    """
    taken: dict[str, nn.Module] = {}
    fresh: dict[str, nn.Module] = {}
    for site in sites:
        prefix = f"{site.name}."
        state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        taken[site.name] = model.get_submodule(site.name)
        if ("bias" in state) != (taken[site.name].bias is not None):
            raise Refusal(f"stored tensors do not fit {site.name}: only one of the two has a bias")
        layer = rebuilt(site, schedule[site.name], state)
        old = next(taken[site.name].parameters())
        fresh[site.name] = layer.to(old.device, old.dtype)
    put_modules(model, fresh)
    return taken
