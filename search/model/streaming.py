"""Collect statistics and decompose a decoder larger than memory by loading one block at a time.

The architecture is built on the meta device, and its blocks are replaced by recorders. The model's own forward pass
then computes embeddings, attention masks, rotary tables and logits, whatever the architecture. Knows where parameters
are stored (safetensors shards, or seeded random ones) and how a transformers decoder calls its blocks. Experts are
taken apart where the files hold them one by one, under the names that they then have.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import nn

from compression.calibration.statistics import Statistics
from compression.calibration.streaming import Batch, passes, stream
from compression.decomposition.factors import FactorStore
from compression.layers.experts import take_apart_
from compression.refusal import Refusal
from compression.sites import Site, check_weight, dense_weight, discover_sites, find_blocks
from compression.storage.factor_cache import FactorCache
from search.model.architecture import empty_model
from search.model.pretrained import different_ties
from search.model.random_models import random_parameter
from search.model.sources import locate
from search.model.weight_files import stored_tensors

__all__ = ["ResidentModel", "StreamedModel", "decompose_streamed"]


class StreamedModel:
    """A transformers decoder as a `compression.calibration.streaming.BlockwiseModel`.

    Args:
        name: as for `search.model.sources.locate`: a folder of safetensors, a hub id or a random model.
        device: device that blocks are loaded to.
        dtype: dtype that weights are converted to.

    Raises:
        ValueError: as for `search.model.sources.locate` and `empty_model`; or no file holds a parameter.
        DataUnavailable: as for `search.model.sources.locate`.
    """

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype) -> None:
        source = locate(name)
        self._model = empty_model(source)
        stored = {} if source.folder is None else stored_tensors(source.name, source.folder)
        fused = any(name in stored for name, values in self._model.named_parameters() if values.ndim == 3)
        take_apart_(self._model, "fused" if fused else "single", checked=False)
        self._read = random_parameter if source.folder is None else _reader(source.name, source.folder, self._model)
        self._device, self._dtype = device, dtype
        self.sites: tuple[Site, ...] = discover_sites(self._model, shapes_only=True)
        self.prefix = self.sites[0].name.partition(".0.")[0]
        self._templates = list(self._model.get_submodule(self.prefix).children())
        self.blocks = len(self._templates)
        self._recorders = [_Recorder(template) for template in self._templates]
        self._model.set_submodule(self.prefix, nn.ModuleList(self._recorders))
        self._tables = {
            id(table) for table in (self._model.get_input_embeddings(), self._model.get_output_embeddings())
        }
        self._model.to(dtype=dtype)
        for path, module in self._model.named_modules():  # norms and learned positions are small: loaded for good
            if id(module) not in self._tables:
                self._fill_(module, path, recurse=False)
                for key, buffer in list(module.named_buffers(recurse=False)):
                    setattr(module, key, buffer.to(device))

    @contextmanager
    def embedding(self) -> Iterator[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """See `BlockwiseModel`."""
        with self._loaded(self._model.get_input_embeddings()):

            def embed(input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
                self._model.base_model(input_ids=input_ids, attention_mask=mask.long(), use_cache=False)
                return self._recorders[0].taken()[0]

            yield embed

    def block(self, index: int) -> nn.Module:
        """See `BlockwiseModel`."""
        block: nn.Module = copy.deepcopy(self._templates[index])
        self._fill_(block, f"{self.prefix}.{index}", recurse=True)
        return block

    def run(self, index: int, block: nn.Module, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """See `BlockwiseModel`."""
        with torch.no_grad():
            self._model.base_model(inputs_embeds=hidden.detach(), attention_mask=mask.long(), use_cache=False)
        _, arguments, named = self._recorders[index].taken()
        output = block(hidden, *arguments, **named)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    @contextmanager
    def head(self) -> Iterator[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """See `BlockwiseModel`."""
        last = self._recorders[-1]
        with self._loaded(self._model.get_output_embeddings()):

            def logits(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
                last.answer = hidden
                try:
                    output = self._model(inputs_embeds=hidden.detach(), attention_mask=mask.long(), use_cache=False)
                finally:
                    last.answer = None
                result: torch.Tensor = output.logits
                return result

            yield logits

    @contextmanager
    def _loaded(self, module: nn.Module) -> Iterator[None]:
        path = next(path for path, other in self._model.named_modules() if other is module)
        empty = dict(module.named_parameters(recurse=False))
        self._fill_(module, path, recurse=False)
        try:
            yield
        finally:
            for key, parameter in empty.items():
                setattr(module, key, parameter)

    def _fill_(self, module: nn.Module, path: str, recurse: bool) -> None:
        """Load the parameters of a module that are on the meta device."""
        for name, parameter in list(module.named_parameters(recurse=recurse)):
            owner, _, leaf = name.rpartition(".")
            values = self._read(self._origin(f"{path}.{name}"), parameter.shape, self._dtype).to(self._device)
            setattr(module.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))

    def _origin(self, name: str) -> str:
        """The name under which a parameter is stored, which differs for a tied output head."""
        table = self._model.get_output_embeddings()
        if getattr(self._model.config, "tie_word_embeddings", False) and table is not None:
            inputs = self._model.get_input_embeddings()
            names = {id(module): path for path, module in self._model.named_modules()}
            if name == f"{names[id(table)]}.weight":
                return f"{names[id(inputs)]}.weight"
        return name


class ResidentModel(StreamedModel):
    """A decoder in memory as a `BlockwiseModel`, so that only its statistics are made one block at a time.

    Use it as a context manager: inside, the blocks of the model are replaced by recorders.

    Args:
        model: the dense model, on one device.
        sites: its sites.
    """

    def __init__(self, model: Any, sites: Sequence[Site]) -> None:
        self._model = model
        self.sites = tuple(sites)
        self.prefix, self._list = find_blocks(model)
        self._templates = list(self._list)
        self.blocks = len(self._templates)
        self._recorders = [_Recorder(template) for template in self._templates]

    def __enter__(self) -> Self:
        self._model.set_submodule(self.prefix, nn.ModuleList(self._recorders))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._model.set_submodule(self.prefix, self._list)

    def block(self, index: int) -> nn.Module:
        """See `BlockwiseModel`."""
        template: nn.Module = self._templates[index]
        return template

    @contextmanager
    def _loaded(self, module: nn.Module) -> Iterator[None]:
        yield


class _Recorder(nn.Module):
    """Replaces a block: records the arguments it is called with and returns its input, or `answer` if that is set."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        if hasattr(block, "attention_type"):  # models with mixed attention choose the mask of a block by this
            self.attention_type = block.attention_type
        self.answer: torch.Tensor | None = None
        self._call: tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]] | None = None

    def forward(self, hidden: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        self._call = (hidden, arguments, named)
        return hidden if self.answer is None else self.answer

    def taken(self) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
        """The arguments of the last call."""
        assert self._call is not None
        return self._call


def decompose_streamed(
    model: StreamedModel,
    batches: Sequence[Batch],
    generator: torch.Generator,
    cache: FactorCache,
    *,
    statistics_key: str,
    shrinkage: float,
    max_chi: int | None = None,
    metric: str = "two-sided",
    blocks: Collection[int] | None = None,
    scratch: Path | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> None:
    """Compute the factors of every site of a model and store them in the cache under the keys of `FactorStore`.

    Args:
        model, batches, generator, scratch: see `compression.calibration.streaming.stream`.
        cache: cache for the factors; it must store them on disk for later use.
        statistics_key, shrinkage, max_chi: see `FactorStore`.
        metric: metric of the factors, "plain", "input" or "two-sided".
        blocks: indices of the blocks to decompose; None decomposes all. The statistics need passes through every block
            in any case.
        progress: called with one line about each completed step.

    Raises:
        ValueError, OSError: as for `compression.calibration.streaming.stream` and `FactorStore.factors`.
    """

    def visit(block: nn.Module, sites: tuple[Site, ...], statistics: Statistics) -> None:
        if blocks is not None and sites[0].block not in blocks:
            return
        start = f"{model.prefix}.{sites[0].block}."
        free = [site.name for site in sites if not site.dense_because]
        weights = {name: dense_weight(block.get_submodule(name.removeprefix(start))) for name in free}
        store = FactorStore(sites, weights, lambda: statistics, statistics_key, shrinkage, cache, max_chi)
        for site in sites:
            if site.dense_because:
                progress(f"{site.name} stays dense: {site.dense_because}")
                continue
            check_weight(site.name, weights[site.name])
            store.factors(site.name, "lowrank", metric)
            progress(site.name)

    def passed(done: int) -> None:
        if done % len(batches) == 0:
            progress(f"pass {done // len(batches)} of {passes(model.blocks, 1)}")

    stream(model, batches, generator, visit, scratch, passed)


def _reader(name: str, folder: Path, model: Any) -> Callable[[str, torch.Size, torch.dtype], torch.Tensor]:
    """A function that reads a parameter by name from the safetensors in `folder`.

    Raises:
        ValueError: as for `search.model.weight_files.stored_tensors`; or the files hold a tensor that the model does
            not take, or two different tensors that its config ties.
    """
    where = stored_tensors(name, folder)
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    for tensor in sorted(where.keys() - model.state_dict().keys()):
        if not any(re.search(pattern, tensor) for pattern in ignored):
            raise Refusal(
                f"model {name!r} holds {tensor}, which the model of its config does not take; correct the config, or "
                "remove the tensor"
            )

    def stored(name: str) -> torch.Tensor:
        with safe_open(where[name], framework="pt") as file:
            values: torch.Tensor = file.get_tensor(name)
        return values

    for target, origin in tied.items():
        if target in where and origin in where and not torch.equal(stored(target), stored(origin)):
            raise Refusal(different_ties(name, target, origin))

    def read(name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        if name not in where:
            raise Refusal(f"model {folder.name!r} lacks the weight {name} that its config asks for")
        values = stored(name)
        if values.shape != shape or not values.is_floating_point():
            raise Refusal(f"weight {name} must be floating point of shape {tuple(shape)}, got {tuple(values.shape)}")
        converted: torch.Tensor = values.to(dtype)
        return converted

    return read
