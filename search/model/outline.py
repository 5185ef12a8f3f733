"""Open a large model without reading its weights, to plan a run of it.

The model has its architecture, shapes, ties and tokenizer, and it runs, but its parameters mean nothing: they are all
views of one buffer, so that a model of any size takes the memory of its largest matrix at most.
"""

from __future__ import annotations

import mmap
from typing import Any

import torch

from compression.sites import model_parameters
from search.model.architecture import empty_model
from search.model.gguf_shards import joined
from search.model.loading import LoadedModel, parameters_as
from search.model.pretrained import quiet_transformers, read_tokenizer, refuse_quantized, unusable
from search.model.random_models import TINY, byte_tokenizer
from search.model.source_files import SourceFiles
from search.model.sources import locate

__all__ = ["LARGE", "UNREAD", "outline"]

LARGE = 1 << 28
"""Bytes of parameters from which on a model is outlined instead of loaded; below, loading takes a second."""
UNREAD = "0" * 64
"""Digest of weights that were never read."""
_PERIOD = 1_000_003  # prime, so that no two rows of a matrix are equal
_STANDARD_DEVIATION = 0.02


def outline(name: str, device: torch.device, dtype: torch.dtype, trusted: bool = False) -> LoadedModel | None:
    """A large model without its weights; None if the model is small.

    Its digest is the one that was remembered when its weights were last loaded in this dtype; `UNREAD` if they never
    were.

    Args:
        name, device, dtype, trusted: as for `search.model.loading.load_model`.

    Raises:
        ValueError, DataUnavailable: as for `load_model`, but for what only the weights themselves show.
    """
    source = locate(name, trusted)
    if source.name in TINY:
        return None
    with joined(source.gguf_files):
        model = empty_model(source)
        if model_parameters(model) * dtype.itemsize < LARGE:
            return None
        refuse_quantized(source, model.config)
        where = {} if source.gguf is None else {"gguf_file": source.gguf}
        try:
            with quiet_transformers():
                tokenizer = (
                    byte_tokenizer() if source.folder is None else read_tokenizer(source.folder, trusted, **where)
                )
        except Exception as error:  # as in `search.model.pretrained.read_pretrained`
            raise unusable(source, error) from error
    files = SourceFiles.of(source)
    _fill_(model, device, dtype)
    model.to(device=device, dtype=dtype)
    digest = files.known(parameters_as(dtype)) or UNREAD
    identity = files.architecture, files.vocabulary
    return LoadedModel(model, tokenizer, source.model_id, digest, source.license, *identity, is_outline=True)


def _fill_(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Give a model on the meta device matrices that share one buffer of random numbers, biases of 0 and norms of 1.

    What only the tables of a large vocabulary reach in the buffer is 0.
    """
    tables = [table.weight for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table]
    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    filled = max(size for key, size in sizes.items() if key not in map(id, tables))
    generator = torch.Generator().manual_seed(0)
    numbers = torch.empty(min(filled, _PERIOD)).normal_(0, _STANDARD_DEVIATION, generator=generator)
    shared = _zeros(max(sizes.values()), device, dtype)
    shared[:filled] = numbers.to(device=device, dtype=dtype).repeat(-(-filled // len(numbers)))[:filled]
    for path, parameter in list(model.named_parameters()):
        owner, _, leaf = path.rpartition(".")
        values = shared[: parameter.numel()].view(parameter.shape)
        if parameter.ndim < 2:
            values = torch.full(parameter.shape, 0.0 if leaf == "bias" else 1.0, device=device, dtype=dtype)
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(values, requires_grad=False))
    model.tie_weights()


def _zeros(count: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Zeros. On a CPU they take memory only where they are written to."""
    if device.type != "cpu":
        return torch.zeros(count, device=device, dtype=dtype)
    pages = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype)
