"""Load a transformers model and tokenizer from a folder or GGUF file."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from compression.refusal import Refusal
from search.model.gguf_shards import gguf_files, joined
from search.model.kinds import Kind, auto_class, kind_of
from search.model.own_code import read_config
from search.model.weight_files import stored_tensors

__all__ = [
    "Source",
    "different_ties",
    "quiet_transformers",
    "read_pretrained",
    "read_tokenizer",
    "refuse_quantized",
    "set_attention_",
    "unusable",
    "with_attention",
]

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Source:
    """The location of a model's files.

    Attributes:
        name: name as the user gave it.
        model_id: name for display and in files.
        license: SPDX-like name, "unknown", or "none" for a random model.
        folder: folder with safetensors or a GGUF file; None for a random model.
        gguf: name of the GGUF file in `folder`, or of its first shard; None for safetensors.
        trusted: whether the code in `folder` may run.
    """

    name: str
    model_id: str
    license: str
    folder: Path | None = None
    gguf: str | None = None
    trusted: bool = False

    @property
    def gguf_files(self) -> tuple[Path, ...]:
        """The GGUF file or its shards in order; empty for safetensors.

        Raises:
            ValueError: a shard is missing.
        """
        return () if self.folder is None or self.gguf is None else gguf_files(self.folder / self.gguf)

    @property
    def kind(self) -> Kind:
        """What kind of model this is. Trusted code that brings a causal language model has the say over its config.

        Raises:
            Refusal: as for `search.model.kinds.kind_of`.
        """
        if self.folder is None or self.gguf is not None:
            return Kind.CAUSAL
        config = read_config(self.folder, "config.json")
        classes = config.get("auto_map")
        if self.trusted and isinstance(classes, dict) and Kind.CAUSAL in classes:
            return Kind.CAUSAL
        return kind_of(self.name, config)


def read_pretrained(source: Source, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load a dense model and its tokenizer from safetensors or a GGUF file.

    Raises:
        ValueError: the files cannot be loaded; weights are missing, misshapen, not taken by the model or tied only by
            its config; or the safetensors are quantized.
    """
    where: dict[str, Any] = {}
    weights: dict[str, Any] = {"use_safetensors": True}
    if source.gguf is not None:
        where["gguf_file"] = source.gguf
        weights = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    try:
        with joined(source.gguf_files):
            model, info = with_attention(
                lambda attention: auto_class(source.kind).from_pretrained(
                    source.folder,
                    dtype=dtype,
                    attn_implementation=attention,
                    output_loading_info=True,
                    local_files_only=True,
                    trust_remote_code=source.trusted,
                    **where,
                    **weights,
                )
            )
            tokenizer = read_tokenizer(source.folder, source.trusted, **where)
    except Exception as error:  # an unknown file can make the libraries raise anything; all of it refuses the file
        raise unusable(source, error) from error
    if broken := sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind]):
        raise Refusal(
            f"model {source.name!r} lacks {len(broken)} weights that its config asks for, such as {broken[0]}"
        )
    _refuse_ignored(
        source, model, (str(key) for key in info["unexpected_keys"] if not _is_other_head(source, str(key)))
    )
    if source.gguf is None:
        refuse_quantized(source, model.config)
    elif getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.config._name_or_path = source.model_id
    return model, tokenizer


def refuse_quantized(source: Source, config: Any) -> None:
    """Refuse a model whose config says that its weights are quantized.

    Raises:
        Refusal: names the model.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise Refusal(f"model {source.name!r} must be dense floating point, but its weights are quantized")


def _is_other_head(source: Source, name: str) -> bool:
    """Whether a stored tensor belongs to the next-sentence head that encoders are published with beside their own."""
    return source.kind.is_encoder and any(part in ("pooler", "seq_relationship") for part in name.split("."))


def _refuse_ignored(source: Source, model: Any, unexpected: Iterable[str]) -> None:
    """Refuse stored weights that the loaded model does not use as they are stored.

    Raises:
        ValueError: the model has no place for a tensor, a tensor is there under two names, or the config ties two
            tensors that differ.
    """
    if ignored := sorted(map(str, unexpected)):
        remedy = "correct the config (layers, biases, quantization), or remove them"
        raise Refusal(
            f"model {source.name!r} holds {len(ignored)} tensors that the model of its config does not take, such as "
            f"{ignored[0]}; {remedy if source.gguf is None else 'use the safetensors of this model'}"
        )
    if source.gguf is None and source.folder is not None:
        names, prefix = stored_tensors(source.name, source.folder), model.base_model_prefix
        if twice := sorted(name for name in names if f"{prefix}.{name}" in names):
            raise Refusal(
                f"model {source.name!r} holds {twice[0]} twice, also as {prefix}.{twice[0]}; remove one of them"
            )
    for target, origin in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter(target) is not model.get_parameter(origin):
            raise Refusal(different_ties(source.name, target, origin))


def different_ties(name: str, target: str, origin: str) -> str:
    """The message for two stored tensors that differ although the config of the model ties them."""
    return (
        f"model {name!r} ties {target} to {origin} in its config, but stores two different tensors; set "
        "tie_word_embeddings to false in the config, or remove the one that is not meant"
    )


def with_attention(make: Callable[[str], _Made]) -> _Made:
    """Make a model with PyTorch's fused attention, or with "eager" attention if its architecture has no other.

    Gemma 2, for example, caps its attention scores, which the fused kernels cannot.

    Args:
        make: makes the model with the attention of this name.
    """
    try:
        return make("sdpa")
    except ValueError as error:
        if 'attn_implementation="eager"' not in str(error):
            raise
    return make("eager")


def set_attention_(model: Any, attention: str) -> None:
    """Have a loaded model compute its attention in another way, in place.

    Raises:
        Refusal: the architecture has no attention of this name, or a package that it needs is missing.
    """
    used = model.config._attn_implementation
    try:
        with quiet_transformers():
            model.set_attn_implementation(attention)
    except (ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Refusal(f"attention {attention} does not work with {type(model).__name__}: {reason}") from error
    if model.config._attn_implementation != attention:  # transformers only logs that it kept the old one
        raise Refusal(f"attention {attention} does not work with {type(model).__name__}, which has {used}; use auto")


def unusable(source: Source, error: Exception) -> Refusal:
    """The refusal for a model that a library cannot load, with the first line of the library's reason."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return Refusal(f"model {source.name!r} cannot be loaded: {reason}")


def read_tokenizer(folder: Path | None, trusted: bool = False, **where: Any) -> Any:
    """Load the tokenizer of a folder or GGUF file without running code from it, unless that code is trusted."""
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted, **where)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress progress bars and log messages of transformers; exceptions still propagate."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # the progress bar of the GGUF reader ignores the setting
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
