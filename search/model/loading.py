"""Load a causal language model by name.

Knows the packaged default model, random models for tests and measurements, local folders and hub ids, and which weight
files are safe to open; does not know sites or schedules. Never opens pickled weights, and runs code that comes with a
model only if it is trusted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import tokenizers
import torch
import transformers

from compression.refusal import Refusal
from compression.storage.strict_json import json_digest
from search.model.architecture import empty_model, shaped_model
from search.model.devices import resolve_device
from search.model.kinds import Kind, auto_class, kind_of_model
from search.model.mapped import read_mapped
from search.model.masking import masked
from search.model.own_code import is_compressed
from search.model.pretrained import quiet_transformers, read_pretrained, read_tokenizer, unusable, with_attention
from search.model.random_models import SHAPES, byte_tokenizer, tiny_model
from search.model.source_files import SourceFiles
from search.model.sources import locate
from search.model.unpacked import read_gguf

__all__ = ["LoadedModel", "assemble", "can_be_assembled", "load_for_use", "load_model", "model_digest", "parameters_as"]


@dataclass(frozen=True)
class LoadedModel:
    """A dense model in evaluation mode, without gradients.

    Attributes:
        model: the causal language model on its device.
        tokenizer: its tokenizer.
        model_id: name for display and in files: a hub id or the name of a folder.
        digest: SHA-256 of names, dtypes, shapes and bytes of the parameters as loaded.
        license: SPDX-like name if known, otherwise "unknown".
        architecture, vocabulary: digests of the files that say what the model computes with its parameters and how it
            reads text, see `search.model.source_files`; empty for a model that comes from no named source.
        is_outline: whether the weights were not read, see `search.model.outline`.
        is_mapped: whether the weights stay on disk, to be read when they are used.
    """

    model: Any
    tokenizer: Any
    model_id: str
    digest: str
    license: str
    architecture: str = ""
    vocabulary: str = ""
    is_outline: bool = False
    is_mapped: bool = False

    @property
    def identity(self) -> dict[str, str]:
        """The digests that tell this model from any other: weights, architecture and vocabulary."""
        return {"weights": self.digest, "architecture": self.architecture, "vocabulary": self.vocabulary}

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text, without special tokens or a length limit."""
        return self.known(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def known(self, ids: Iterable[int]) -> list[int]:
        """The token ids as a list.

        Raises:
            Refusal: the model has no embedding for one of them, for example a token that was added to the tokenizer.
        """
        found, rows = list(ids), int(self.model.config.get_text_config().vocab_size)
        if found and max(found) >= rows:
            token = self.tokenizer.convert_ids_to_tokens(max(found))
            raise Refusal(
                f"model {self.model_id!r} has embeddings for {rows} tokens, but its tokenizer makes token {max(found)} "
                f"({token!r:.40}) of a text; remove the added token from the tokenizer, or resize the embeddings"
            )
        return found

    @cached_property
    def tokenizer_digest(self) -> str | None:
        """Digest of all that determines the token ids of a text; None for a tokenizer with code of its own."""
        kind, whole = type(self.tokenizer), getattr(self.tokenizer, "backend_tokenizer", None)
        if whole is None or not kind.__module__.startswith("transformers."):
            return None
        options = kind.__name__, bool(getattr(self.tokenizer, "split_special_tokens", False))
        return json_digest([*options, tokenizers.__version__, transformers.__version__, whole.to_str()])

    @cached_property
    def kind(self) -> Kind:
        """What kind of model this is."""
        return kind_of_model(self.model)

    @cached_property
    def mask_token(self) -> int | None:
        """The token that a masked language model predicts the original of; None for models of other kinds.

        Raises:
            Refusal: the model is a masked language model, and its tokenizer has no such token.
        """
        if self.kind is not Kind.MASKED:
            return None
        if (token := self.tokenizer.mask_token_id) is None:
            raise Refusal(
                f"model {self.model_id!r} predicts masked tokens, but its tokenizer has no mask token; set mask_token "
                "in its tokenizer_config.json"
            )
        return int(token)

    def masked(self, tokens: Sequence[int]) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        """A text as a masked language model reads it, see `search.model.masking.masked`. Needs a `mask_token`.

        Args:
            tokens: the text with its `beginning`, without its `ending`. What exceeds the positions is cut off.
        """
        assert self.mask_token is not None
        return masked(self.whole(tokens), self.mask_token, self.tokenizer.all_special_ids)

    def whole(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """A text with its `ending`; what exceeds the positions of the model is cut off before that."""
        room = None if self.positions is None else self.positions - len(self.ending)
        return (*tokens[:room], *self.ending)

    def must_continue_text(self, purpose: str) -> None:
        """Refuse an encoder where text has to be continued.

        Args:
            purpose: what needs it, as the subject of the message.
        """
        if self.kind.is_encoder:
            raise Refusal(
                f"{purpose} needs a model that continues text, and {self.model_id} is a {type(self.model).__name__}, "
                "an encoder"
            )

    @cached_property
    def positions(self) -> int | None:
        """The most tokens of a sequence; None if the model's configuration sets no limit."""
        config = self.model.config.get_text_config()
        named = (getattr(config, name, None) for name in ("n_positions", "max_position_embeddings", "n_ctx"))
        length = next((int(length) for length in named if length), None)
        if length is None:
            return None
        tables = [module for name, module in self.model.named_modules() if name.endswith("position_embeddings")]
        padding = [table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None]
        return int(length - sum(place + 1 for place in padding))  # RoBERTa counts from the one after that of padding

    def encode_whole(self, text: str) -> list[int]:
        """Token ids of a text from its beginning on, without a length limit.

        As in lm-eval, `beginning` precedes the text unless the text itself starts with that token.
        """
        begun = self._beginning_text and text.startswith(self._beginning_text)
        return self.encode(text) if begun else [*self.beginning, *self.encode(text)]

    @cached_property
    def beginning(self) -> tuple[int, ...]:
        """Special tokens that the tokenizer puts before a text, such as the beginning-of-sequence token; often none.

        A model that was trained with such a token gives wrong likelihoods without it. What is scored, or used for
        statistics or training, therefore starts with these tokens. Tokens that a tokenizer puts after a text are used
        for encoders only, since a causal model scores texts that go on.
        """
        return self._around[0]

    @cached_property
    def ending(self) -> tuple[int, ...]:
        """Special tokens that the tokenizer puts after a text, for an encoder; empty for models that continue text."""
        return self._around[1] if self.kind.is_encoder else ()

    @cached_property
    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Special tokens that the tokenizer puts before and after a text."""
        text = "a"
        bare, whole = self.encode(text), list(self.tokenizer(text, verbose=False)["input_ids"])
        starts = range(len(whole) - len(bare) + 1)
        at = next((at for at in starts if whole[at : at + len(bare)] == bare), None)
        return ((), ()) if at is None else (tuple(whole[:at]), tuple(whole[at + len(bare) :]))

    @cached_property
    def _beginning_text(self) -> str:
        return str(self.tokenizer.decode(list(self.beginning))) if self.beginning else ""


def load_model(
    name: str,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
    trusted: bool = False,
    progress: Callable[[int], None] = lambda percent: None,
) -> LoadedModel:
    """Load a dense model in evaluation mode, without gradients.

    Args:
        name: as for `search.model.sources.locate`.
        device: as for `resolve_device`, or a torch device.
        dtype: dtype that the parameters are converted to.
        trusted: whether code that comes with the model may run.
        progress: called with percents of the conversion of a GGUF file as they are done, 100 in all.

    Raises:
        ValueError: as for `locate` and `resolve_device`; or weights are missing, misshapen or unreadable.
        DataUnavailable: as for `locate`.
    """
    place = device if isinstance(device, torch.device) else resolve_device(device)
    source = locate(name, trusted)
    files = SourceFiles.of(source)
    mapped: tuple[Any, Any] | None = None
    with quiet_transformers():
        if source.folder is None:
            make = shaped_model if source.name in SHAPES else tiny_model
            model, tokenizer = make(source.name, dtype), byte_tokenizer()
        elif source.gguf is not None:
            model, tokenizer = mapped = read_gguf(source, dtype, progress)
        else:
            mapped = read_mapped(source, dtype) if place.type == "cpu" else None
            model, tokenizer = mapped or read_pretrained(source, dtype)
    model.to(device=place, dtype=dtype).eval().requires_grad_(False)
    digest = files.remembered(parameters_as(dtype), lambda: model_digest(model))
    identity, on_disk = (files.architecture, files.vocabulary), mapped is not None and place.type == "cpu"
    return LoadedModel(model, tokenizer, source.model_id, digest, source.license, *identity, is_mapped=on_disk)


def load_for_use(name: str, device: str | torch.device = "auto", trusted: bool = False) -> LoadedModel:
    """Load a dense or compressed model in order to run it.

    A compressed folder is loaded in its stored dtype, a dense model in bfloat16 on a GPU and in float32 on a CPU. The
    code of a compressed folder is never run.

    Raises:
        ValueError: as for `load_model`; or a compressed folder fails its verification.
        DataUnavailable: as for `load_model`.
    """
    place = device if isinstance(device, torch.device) else resolve_device(device)
    source = locate(name, trusted)
    if source.folder is None or not is_compressed(source.folder):
        return load_model(name, place, torch.bfloat16 if place.type == "cuda" else torch.float32, trusted)
    files = SourceFiles.of(source)
    import search.hf  # noqa: F401 (registers compressed folders with transformers)

    with quiet_transformers():
        try:
            model = with_attention(
                lambda attention: auto_class(source.kind).from_pretrained(
                    source.folder, attn_implementation=attention, local_files_only=True, trust_remote_code=False
                )
            )
            tokenizer = read_tokenizer(source.folder)
        except Exception as error:  # as in `read_pretrained`
            raise unusable(source, error) from error
    model.to(place).eval().requires_grad_(False)
    digest = files.remembered("compressed", lambda: model_digest(model))
    return LoadedModel(model, tokenizer, source.model_id, digest, source.license, files.architecture, files.vocabulary)


def can_be_assembled(name: str) -> bool:
    """Whether `assemble` supports this model, which it does unless the model is a GGUF file."""
    return locate(name).gguf is None


def assemble(
    name: str, device: torch.device, parameters: Mapping[str, torch.Tensor], digest: str, trusted: bool = False
) -> LoadedModel:
    """The same model as from `load_model`, built from given parameters, which may be memory-mapped.

    Args:
        name: as for `locate`; not a GGUF file.
        device: the device of the model.
        parameters: all parameters by name, all of the same dtype; tied parameters occur once.
        digest: digest of the parameters, see `model_digest`; it is not checked.
        trusted: whether code that comes with the model may run.

    Raises:
        ValueError: as for `load_model`; or the model's config asks for other parameters.
        DataUnavailable: as for `load_model`.
    """
    source = locate(name, trusted)
    model = empty_model(source)
    wanted = [path for path, _ in model.named_parameters()]
    if differing := sorted(set(wanted).symmetric_difference(parameters)):
        raise Refusal(
            f"model {source.name!r} has another architecture than the process that shared its parameters: "
            f"{len(differing)} parameters differ, such as {differing[0]}; all machines need the same model"
        )
    for path in wanted:
        owner, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(parameters[path], requires_grad=False))
    model.tie_weights()
    model.to(device=device, dtype=next(iter(parameters.values())).dtype).eval().requires_grad_(False)
    with quiet_transformers():
        tokenizer = byte_tokenizer() if source.folder is None else read_tokenizer(source.folder, trusted)
    files = SourceFiles.of(source)
    return LoadedModel(model, tokenizer, source.model_id, digest, source.license, files.architecture, files.vocabulary)


def parameters_as(dtype: torch.dtype) -> str:
    """What `search.model.source_files.SourceFiles` remembers the digest of parameters of this dtype under."""
    return f"parameters, {dtype}"


def model_digest(model: torch.nn.Module, dtype: torch.dtype | None = None) -> str:
    """SHA-256 of the name, dtype, shape and bytes of every parameter and saved buffer, in hex; tied ones count once.

    Args:
        dtype: the digest is that of the parameters converted to this dtype; None takes them as they are.
    """
    digest = hashlib.sha256()
    saved = model.state_dict().keys()
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name in saved)
    parameters = ((name, parameter.detach().to(dtype)) for name, parameter in model.named_parameters())
    for name, tensor in chain(parameters, buffers):
        values = tensor.cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
