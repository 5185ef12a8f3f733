"""Find out which tensors the safetensors of a model folder hold, and refuse a folder where that is ambiguous.

Reads file names and headers only. transformers reads `model.safetensors`, or else the files that the index names; any
other weights in the folder would be ignored without a word, or be applied on top by another library.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from compression.refusal import Refusal
from compression.storage.strict_json import read_object

__all__ = ["refuse_adapter", "stored_tensors"]

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LARGEST_INDEX = 1 << 28  # bytes
_COPY = "consolidated"  # Mistral's folders hold the same weights a second time in files of this name


def stored_tensors(name: str, folder: Path) -> Mapping[str, Path]:
    """The file of every tensor that a folder of safetensors holds, by the tensor's name.

    Args:
        name: name of the model, for messages.

    Raises:
        Refusal: the folder holds an adapter, several sets of weights, a tensor twice, a file that is not safetensors,
            or an index that does not match its files.
    """
    refuse_adapter(name, folder)
    present = sorted(path.name for path in folder.iterdir())
    weights = [file for file in present if file.endswith(".safetensors") and not file.startswith(_COPY)]
    if _WHOLE in present and _INDEX in present:
        raise Refusal(
            f"model {name!r} holds its weights twice, in {_WHOLE} and in the files of {_INDEX}; remove one set"
        )
    if _WHOLE in present:
        listed, read = None, [_WHOLE]
    elif _INDEX in present:
        listed = _index(name, folder / _INDEX)
        read = sorted(set(listed.values()))
    else:
        other = next(file for file in present if file.endswith(".safetensors"))
        raise Refusal(f"model {name!r} must hold {_WHOLE} or {_INDEX}, but its weights are in {other}")
    if stray := sorted(set(weights).difference(read)):
        beside = _INDEX if listed else _WHOLE
        raise Refusal(f"model {name!r} holds {stray[0]}, which is not read beside {beside}; move it to another folder")
    found: dict[str, Path] = {}
    for file in read:
        for tensor in _names(name, folder / file):
            if tensor in found:
                raise Refusal(f"model {name!r} holds {tensor} twice, in {found[tensor].name} and in {file}")
            found[tensor] = folder / file
    if listed is not None:
        for tensor in sorted({*listed, *found}):
            if tensor not in listed or tensor not in found or found[tensor].name != listed[tensor]:
                where = found[tensor].name if tensor in found else "no file"
                said = listed.get(tensor, "does not list it")
                raise Refusal(f"model {name!r} has {tensor} in {where}, but {_INDEX} says otherwise: {said}")
    return found


def refuse_adapter(name: str, folder: Path) -> None:
    """Refuse a folder with an adapter beside the weights, which transformers would load on top of them.

    Raises:
        Refusal: names the adapter's file.
    """
    files = sorted(path.name for path in folder.iterdir())
    if adapters := [file for file in files if file.startswith(("adapter_config.", "adapter_model."))]:
        raise Refusal(
            f"model {name!r} holds an adapter ({adapters[0]}) beside its weights; merge it into them (in PEFT: "
            "merge_and_unload), or move it to another folder"
        )


def _index(name: str, path: Path) -> dict[str, str]:
    """The file name of every tensor according to an index."""
    listed = read_object(path, f"the index of model {name!r},", _LARGEST_INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise Refusal(f"model {name!r} has an index without a weight_map of file names: {path}")
    if outside := [file for file in listed.values() if Path(file).name != file or not file.endswith(".safetensors")]:
        raise Refusal(f"model {name!r} has an index that names {outside[0]!r}, which is no safetensors file beside it")
    return listed


def _names(name: str, path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise Refusal(f"model {name!r} cannot be loaded: {path.name}: {str(error).splitlines()[0]}") from error
