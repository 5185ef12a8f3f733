"""Checks that a model which is loaded again is the one that a prior was made for.

Compares digests of the weights, of the architecture and, where the run recorded them, of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import torch

from compression.refusal import Refusal
from search.model.loading import LoadedModel, model_digest
from search.priors.build import config_digest
from search.priors.format import Prior

__all__ = ["refuse_other_model"]

_PARTS = {
    "weights": "weights",
    "architecture": "config.json",
    "vocabulary": "tokenizer",
}
"""The parts of `LoadedModel.identity` and what messages call them."""


def refuse_other_model(
    prior: Prior,
    loaded: LoadedModel,
    place: Path,
    note: Callable[[str], None],
    recorded: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Refuse a model that is not the one that the prior was made for; its figures would belong to another model.

    Args:
        place: the folder or file of the prior, for messages.
        note: receives one line about what cannot be checked.
        recorded: `LoadedModel.identity` of the model as the run recorded it; earlier versions recorded nothing.

    Raises:
        Refusal: the model has another name, other weights, another config or another tokenizer.
    """
    if prior.model.id != loaded.model_id:
        raise Refusal(
            f"{place} was made from model {prior.model.id}, not from {loaded.model_id}; name the former with --model"
        )
    known = {"weights": prior.model.digest, **recorded}
    if not recorded and known["weights"] != loaded.digest and _may_be_of_another_dtype(prior, loaded):
        note(
            f"{place} does not say in which dtype its model was loaded, and that was not "
            f"{str(loaded.model.dtype).removeprefix('torch.')} as here: its figures may differ slightly"
        )
        del known["weights"]
    different = [name for part, name in _PARTS.items() if known.get(part, own := loaded.identity[part]) != own]
    if not different and _other_config(prior, loaded):
        different = [_PARTS["architecture"]]
    if different:
        raise Refusal(
            f"{place} was made from {prior.model.id} with other {' and '.join(different)} than the model has now "
            f"(digest {prior.model.digest[:12]}, now {loaded.digest[:12]}); put the former model back, or search again"
        )


def _may_be_of_another_dtype(prior: Prior, loaded: LoadedModel) -> bool:
    """Whether a prior that does not name a dtype, as those of earlier versions, can be of this model in another one."""
    if prior.configuration.get("dtype", "auto") != "auto":
        return False
    return loaded.model.dtype != torch.float32 or model_digest(loaded.model, torch.bfloat16) == prior.model.digest


def _other_config(prior: Prior, loaded: LoadedModel) -> bool:
    """Whether the config differs from the prior's, which can be told only with the same version of transformers."""
    packages = prior.environment.get("packages")
    before = packages.get("transformers") if isinstance(packages, dict) else None
    return before == version("transformers") and prior.model.config_digest not in (None, config_digest(loaded))
