"""Tell from the config of a model what kind of model it is, and which class of transformers loads it.

The architecture that a config names counts first, so that a model is loaded as what it was saved as: transformers also
offers a decoder's reading of an encoder, and the language part of some image-text models without the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from compression.refusal import Refusal

__all__ = ["Kind", "auto_class", "kind_of", "kind_of_model"]

_CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
_IMAGE_TEXT = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
_MASKED = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
_PAIRS = {
    **modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    **modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
}
_PRETRAINED = modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES
_CLASSIFIERS = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
_TAKEN = (
    "Chisel compresses causal language models, the language part of image-text models, and encoders that predict "
    "masked tokens or classify texts"
)


class Kind(StrEnum):
    """The kinds of models that can be compressed; the value is the name of the class of transformers that loads it."""

    CAUSAL = "AutoModelForCausalLM"
    IMAGE_TEXT = "AutoModelForImageTextToText"
    MASKED = "AutoModelForMaskedLM"
    CLASSIFIER = "AutoModelForSequenceClassification"

    @property
    def is_encoder(self) -> bool:
        """Whether every token sees the whole text, so that the model cannot continue it."""
        return self in (Kind.MASKED, Kind.CLASSIFIER)


def auto_class(kind: Kind) -> Any:
    """The class of transformers that loads models of a kind."""
    return getattr(transformers, kind.value)


def kind_of(name: str, config: Mapping[str, Any]) -> Kind:
    """The kind of the model that a config describes.

    Args:
        name: name of the model, for messages.
        config: the content of config.json. An architecture that transformers does not know is taken to be causal.

    Raises:
        Refusal: no model of this kind can be compressed; the message says what it is.
    """
    family, named = config.get("model_type"), config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else ""
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        return Kind.CAUSAL
    called = f"model {name!r} is a {architecture or family}"
    causal = architecture in _classes(_CAUSAL, family)
    if config.get("is_encoder_decoder") or (family in _PAIRS and not causal):
        raise Refusal(f"{called}, a pair of an encoder and a decoder; {_TAKEN}")
    if family in _IMAGE_TEXT and (architecture in _classes(_IMAGE_TEXT, family) or not causal):
        return Kind.IMAGE_TEXT
    if family in _MASKED and not (causal and config.get("is_decoder")):
        if architecture in _classes(_CLASSIFIERS, family):
            return Kind.CLASSIFIER
        if not architecture or causal or architecture in (*_classes(_MASKED, family), *_classes(_PRETRAINED, family)):
            return Kind.MASKED
        raise Refusal(f"{called}, an encoder of another kind; {_TAKEN}")
    if family not in _CAUSAL:
        raise Refusal(f"{called}, which is no language model; {_TAKEN}")
    return Kind.CAUSAL


def kind_of_model(model: Any) -> Kind:
    """The kind of a model in memory; one that is not of transformers is taken to be causal."""
    if not hasattr(model, "config"):
        return Kind.CAUSAL
    return kind_of(type(model).__name__, {**model.config.to_dict(), "architectures": [type(model).__name__]})


def _classes(mapping: Mapping[str, str | tuple[str, ...]], family: str) -> tuple[str, ...]:
    """The names of the classes that transformers has for a family of models; some families have several."""
    found = mapping.get(family, ())
    return (found,) if isinstance(found, str) else tuple(found)
