"""Open a folder of safetensors whose weights would not fit into memory: they stay on disk and are mapped from there.

The system reads a block of the model when it is used, and forgets it when memory is short. Weights of another dtype are
first converted, some at a time, into files of the cache. Knows safetensors and the parameters of transformers models;
does not know GGUF files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from compression.sites import model_parameters
from compression.storage.strict_json import json_digest
from compression.storage.tensor_files import system_errors
from search.model.architecture import empty_model
from search.model.pretrained import Source, read_tokenizer, unusable
from search.model.unpacked import check_space, map_, shapes_of
from search.model.verified_folders import made_once
from search.model.weight_files import stored_tensors
from search.runtime.files import cache_folder, unwritable
from search.runtime.memory import available_memory
from search.runtime.remembered import remembered_digest

__all__ = ["read_mapped"]

_ROOM = 1.5
"""A model is mapped if so many times its size is more than the memory that is left: loading takes more than a model."""
_PARTS = 8  # a conversion takes at most about this share of a model at a time
_LEAST = 1 << 26  # bytes of the files of the smallest model that is mapped
_STORED = (torch.float32, torch.bfloat16, torch.float16)


def read_mapped(source: Source, dtype: torch.dtype) -> tuple[Any, Any] | None:
    """The model of a folder of safetensors with memory-mapped parameters, and its tokenizer.

    Args:
        source: a folder of safetensors.
        dtype: dtype of the parameters.

    Returns:
        None if the model fits into memory, or if its files do not hold its parameters one by one, under its own names.

    Raises:
        ValueError: as for `search.model.architecture.empty_model`, or the tokenizer cannot be read.
        DataUnavailable: the cache cannot be written.
        OSError: the disk is full.
    """
    assert source.folder is not None
    where = stored_tensors(source.name, source.folder)
    files = sorted(set(where.values()))
    if (available := available_memory()) is None or sum(file.stat().st_size for file in files) < _LEAST:
        return None
    if _ROOM * sum(file.stat().st_size for file in files) * 4 < available:  # of whatever dtype, it fits
        return None
    model = empty_model(source)
    if _ROOM * model_parameters(model) * dtype.itemsize < available or not _is_plain(model, where):
        return None
    try:
        tokenizer = read_tokenizer(source.folder, source.trusted)
    except Exception as error:  # as in `search.model.pretrained.read_pretrained`
        raise unusable(source, error) from error
    if any(stored != dtype for _, stored in _headers(where).values()):
        files = sorted(_converted(source, model, where, dtype).glob("*.safetensors"))
    map_(model, files, dtype, source)
    if model.can_generate() and (source.folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=False
        )
    return model, tokenizer


def _is_plain(model: Any, where: Mapping[str, Path]) -> bool:
    """Whether the files hold just the parameters and saved buffers of a model, by name and shape, each once."""
    if getattr(model.config, "quantization_config", None) is not None:
        return False
    wanted = shapes_of(model)
    if wanted.keys() != where.keys():
        return False
    return all(shape == wanted[name] and dtype in _STORED for name, (shape, dtype) in _headers(where).items())


def _headers(where: Mapping[str, Path]) -> dict[str, tuple[torch.Size, torch.dtype | None]]:
    """Shape and dtype of every tensor, without its values; None for a dtype that no model is computed in."""
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    found = {}
    for path in sorted(set(where.values())):
        with safe_open(path, framework="pt") as file:
            for name in (name for name, at in where.items() if at == path):
                part = file.get_slice(name)
                found[name] = torch.Size(part.get_shape()), names.get(part.get_dtype())
    return found


def _converted(source: Source, model: Any, where: Mapping[str, Path], dtype: torch.dtype) -> Path:
    """The folder in the cache with the tensors in another dtype, which is made at the first call."""
    home, short = cache_folder() / "models", str(dtype).removeprefix("torch.")
    digest = json_digest([remembered_digest(file) for file in sorted(set(where.values()))])
    size = model_parameters(model) * dtype.itemsize

    def make(made: Path) -> None:
        check_space(home, size)
        with system_errors(home):
            for number, tensors in enumerate(_groups(where, dtype, size // _PARTS)):
                save_file(tensors, made / f"part-{number:05}.safetensors")

    try:
        return made_once(home / f"{source.model_id.replace('/', '--')}-{digest[:12]}-{short}", make)
    except PermissionError as error:
        raise unwritable(home, error) from error


def _groups(where: Mapping[str, Path], dtype: torch.dtype, most: int) -> Iterator[dict[str, torch.Tensor]]:
    """All tensors in a dtype, in groups of about `most` bytes."""
    together: dict[str, torch.Tensor] = {}
    for path in sorted(set(where.values())):
        with safe_open(path, framework="pt") as file:
            for name in sorted(name for name, at in where.items() if at == path):
                together[name] = file.get_tensor(name).to(dtype)
                if sum(values.nbytes for values in together.values()) > most:
                    yield together
                    together = {}
    if together:
        yield together
