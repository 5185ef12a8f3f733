"""Converts a GGUF file once: its tensors as the model names them, dequantized, in files of the cache to be mapped.

The conversion takes a few blocks at a time, so that memory holds little more than the file. Knows GGUF files and the
parameters of transformers models; does not know the default model.
"""

from __future__ import annotations

import copy
import errno
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.integrations.gguf.utils import is_gguf_arch_supported
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from compression.sites import model_parameters
from compression.storage.tensor_files import system_errors
from search.model.architecture import empty_model
from search.model.gguf_shards import joined, joined_reader, reading
from search.model.pretrained import Source, quiet_transformers, read_pretrained, read_tokenizer, unusable
from search.model.source_files import SourceFiles
from search.model.verified_folders import made_once
from search.runtime.files import cache_folder, unwritable

__all__ = ["check_space", "map_", "read_gguf", "shapes_of", "unpacked"]

_BLOCK = re.compile(r"blk\.(\d+)\.")
_PARTS = 8  # the conversion takes at most about this share of a model at a time


def read_gguf(
    source: Source, dtype: torch.dtype, progress: Callable[[int], None] = lambda percent: None
) -> tuple[Any, Any]:
    """The model of a GGUF file with memory-mapped parameters, and its tokenizer.

    Args:
        source: a GGUF model.
        dtype: dtype of the parameters.
        progress: called with percents of the conversion as they are done.

    Raises:
        ValueError: as for `search.model.pretrained.read_pretrained`.
        DataUnavailable: the cache cannot be written.
        OSError: the disk is full.
    """
    with joined(source.gguf_files):
        model = empty_model(source)
        try:
            tokenizer = read_tokenizer(source.folder, source.trusted, gguf_file=source.gguf)
        except Exception as error:  # as in `read_pretrained`
            raise unusable(source, error) from error
    map_(model, sorted(unpacked(source, model, dtype, progress).glob("*.safetensors")), dtype, source)
    return model, tokenizer


def map_(model: Any, files: Iterable[Path], dtype: torch.dtype, source: Source) -> None:
    """Give a model without weights those of some files, which are memory-mapped.

    Args:
        model: see `search.model.architecture.empty_model`.
        files: safetensors with the tensors of `shapes_of`.
        dtype: dtype of the tensors.
        source: where the model is from.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    model.config.dtype = dtype
    model.config._name_or_path = source.model_id


def unpacked(
    source: Source, model: Any, dtype: torch.dtype, progress: Callable[[int], None] = lambda percent: None
) -> Path:
    """The folder in the cache with the tensors of a GGUF model, which is made at the first call.

    Args:
        source: a GGUF model.
        model: its model without weights, see `search.model.architecture.empty_model`.
        dtype: dtype of the tensors.
        progress: as for `read_gguf`.

    Raises:
        ValueError, DataUnavailable, OSError: as for `read_gguf`.
    """
    home, digest = cache_folder() / "models", SourceFiles.of(source).architecture
    short = str(dtype).removeprefix("torch.")
    folder = home / f"{source.model_id}-{digest[:12]}-{short}-transformers-{transformers.__version__}"

    def make(made: Path) -> None:
        check_space(home, model_parameters(model) * dtype.itemsize)
        with system_errors(home):
            _unpack(source, model, dtype, made, progress)

    try:
        return made_once(folder, make)
    except PermissionError as error:
        raise unwritable(home, error) from error


def _unpack(source: Source, model: Any, dtype: torch.dtype, made: Path, progress: Callable[[int], None]) -> None:
    """Write the tensors of a model into the new folder `made`."""
    shapes = shapes_of(model)
    written: dict[str, torch.Size] = {}
    total, percent = sum(shape.numel() for shape in shapes.values()), 0
    for number, tensors in enumerate(_converted(source, model, dtype)):
        taken = {name: values for name, values in tensors.items() if name in shapes}
        save_file(taken, made / f"part-{number:05}.safetensors")
        written |= {name: values.shape for name, values in taken.items()}
        done = 100 * sum(shape.numel() for shape in written.values()) // total
        progress(done - percent)
        percent = done
    if written != shapes:  # transformers knows how to convert the whole, or says what is missing
        shutil.rmtree(made)
        made.mkdir()
        whole, _ = read_pretrained(source, dtype)
        save_file({name: values for name, values in whole.state_dict().items() if name in shapes}, made / "whole")
        (made / "whole").rename(made / "part-00000.safetensors")


def shapes_of(model: Any) -> dict[str, torch.Size]:
    """The shapes of all parameters and saved buffers by name; tied parameters occur once."""
    saved = model.state_dict()
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: values.shape for name, values in tensors if name in saved}


def _converted(source: Source, model: Any, dtype: torch.dtype) -> Iterator[Mapping[str, torch.Tensor]]:
    """Tensors by the model's names, a few blocks at a time; none for what transformers only converts as a whole."""
    files = source.gguf_files
    reader = joined_reader(files)
    if is_gguf_arch_supported(str(reader.get_field("general.architecture").contents())):
        return
    blocks = defaultdict(list)
    for tensor in reader.tensors:
        match = _BLOCK.match(tensor.name)
        blocks[match[1] if match else tensor.name].append(tensor)
    most = sum(int(tensor.n_elements) for tensor in reader.tensors) // _PARTS
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    together: list[Any] = []
    for tensors in [*blocks.values(), []]:
        if together and (not tensors or sum(int(one.n_elements) for one in together + tensors) > most):
            part = copy.copy(reader)
            part.tensors, part.fields = together, fields
            with quiet_transformers(), reading(files, part):
                found = load_gguf_checkpoint(str(files[0]), True, model, dtype)
            yield found["tensors"]
            together = []
        together += tensors


def check_space(home: Path, needed: int) -> None:
    """Refuse to write a model of so many bytes to a disk with less space. Raises OSError (ENOSPC)."""
    if (free := shutil.disk_usage(home).free) < needed:
        text = f"the model takes {needed / 1e6:,.1f} MB in {home} and {free / 1e6:,.1f} MB are free"
        raise OSError(errno.ENOSPC, text)
