"""Writes a model in memory, compressed or dense, as a folder that others can load.

Works on any causal language model whose compressed modules are in place, wherever they came from. The folder is loaded
once and its logits compared before it gets its name, so that it appears complete and right, or not at all.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from compression.layers.kept import kept
from compression.layers.merge import merge_
from compression.layers.mpo_linear import MPOLinear
from compression.layers.packed import PackedMPO
from compression.layers.skeleton import describe
from compression.layers.sparse_linear import SparseLinear
from compression.refusal import Refusal
from compression.storage.temporary_names import temporary_folder
from compression.storage.tensor_files import system_errors
from search.engines import INTEGERS
from search.export.forms import FORMATS, GGUF
from search.export.gguf_architectures import CONVERTIBLE, SOURCE
from search.export.gguf_file import check_gguf, write_gguf
from search.export.integers import check_integers, integer_model, rounded_matrices, stands_for
from search.export.loaded_again import is_own_architecture, refuse_unlike
from search.export.plain import plain_model
from search.export.standalone import standalone_source
from search.hf import ChiselConfig, ChiselQuantizer
from search.model import modeling_deci
from search.model.architecture import bare_model
from search.model.kinds import Kind, kind_of, kind_of_model
from search.model.modeling_deci import DeciLMForCausalLM
from search.model.own_code import MODULE
from search.model.pretrained import quiet_transformers
from search.runtime.run_folder import refuse_used
from search.serving.backbone import ARCHITECTURE

__all__ = [
    "CARD",
    "FORMATS",
    "GGUF",
    "Footprint",
    "check_export",
    "export_dense_",
    "export_gguf",
    "export_integers",
    "export_model",
    "export_plain",
    "footprint",
    "forms",
]

CARD = "README.md"
_DECI: Mapping[str, object] = {
    "auto_map": {
        "AutoConfig": "configuration_deci.DeciLMConfig",
        "AutoModelForCausalLM": "modeling_deci.DeciLMForCausalLM",
    },
    "model_file": "modeling_mlx.py",
}
"""What config.json says of the code of a DeciLM model: what transformers and, below, what mlx-lm takes."""

_DECI_FILES = ("configuration_deci.py", "modeling_deci.py", "modeling_mlx.py")
_COPIED = ("tokenizer.model", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Files of the original's folder that neither its model nor its tokenizer writes: the sentencepiece vocabulary, which
llama.cpp's converter needs, and what prepares the images of an image-text model."""


@dataclass(frozen=True)
class Footprint:
    """Size of a model in bytes, with tied tensors counted once.

    Attributes:
        stored: bytes of the model's parameters and saved buffers in memory; on disk, names and shapes come on top.
        float32: bytes of the dense model in float32.
    """

    stored: int
    float32: int

    @property
    def saved(self) -> float:
        """Share of the dense float32 bytes that is saved, at most 1."""
        return 1 - self.stored / self.float32

    @property
    def saved_of_float16(self) -> float:
        """Share of the dense float16 bytes that is saved; negative if the model is larger than that."""
        return 1 - 2 * self.stored / self.float32

    def __str__(self) -> str:
        return (
            f"{self.stored / 1e6:,.1f} MB; the dense model has {self.float32 / 1e6:,.1f} MB in float32 "
            f"({self.saved:.1%} less) and {self.float32 / 2e6:,.1f} MB in float16 ({self.saved_of_float16:.1%} less)"
        )


def footprint(model: Any) -> Footprint:
    """Return the footprint of a model beside that of the dense model of its architecture."""
    tensors = {values.data_ptr(): values for values in model.state_dict().values()}
    return Footprint(
        sum(values.numel() * values.element_size() for values in tensors.values()),
        4 * sum(parameter.numel() for parameter in bare_model(model).parameters()),
    )


def forms(model: nn.Module) -> str:
    """Return a sentence with the number of matrices of each compressed form."""
    mpos = sum(isinstance(module, MPOLinear | PackedMPO) for module in model.modules())
    cut = sum(bool(kept(module)) for module in model.modules())
    found = [f"{mpos} matrices are MPOs", f"{cut} have lost rows or columns"]
    if pruned := sum(isinstance(module, SparseLinear) for module in model.modules()):
        found.append(f"{pruned} are pruned")
    return f"{', '.join(found[:-1])}, and {found[-1]}."


def export_model(model: Any, tokenizer: Any, folder: Path, card: str = "", beside: Sequence[Path] = ()) -> None:
    """Write a compressed model as a folder that transformers loads; the model itself does not change.

    The folder also holds the code that reads the weights, for `trust_remote_code=True`; after `import search.hf`, that
    code is not run. The compressed modules must be of the types that `compression.layers.skeleton.describe` knows.

    Args:
        folder: where to write; must be new or empty.
        card: text of the folder's README.md; an empty text writes none.
        beside: files to copy into the folder.

    Raises:
        ValueError: the folder is in use or not empty, the model has no compressed module, or its architecture is not
            defined in transformers itself.
        OSError: the folder cannot be written; nothing is left behind.
    """
    modules = describe(model)
    if not modules:
        raise Refusal("nothing in this model is compressed; export it with --format dense")
    _check_form("hf", model, tokenizer)
    config, architecture, base = (type(each).__name__ for each in (model.config, model, model.base_model))
    with _whole(folder) as partial, _plugged_in(model, modules):
        _save(model, tokenizer, partial, card, beside)
        kind, served = kind_of_model(model), _is_served(model)
        source = standalone_source(config, architecture, base if served else "")
        (partial / f"{MODULE}.py").write_text(source, encoding="utf-8")
        names = {"AutoConfig": config, kind.value: ARCHITECTURE if served else architecture}
        if served:
            names["AutoModel"] = base
            _state(partial, {"architectures": [ARCHITECTURE]})
        _state(partial, {"auto_map": {name: f"{MODULE}.{each}" for name, each in names.items()}})
        refuse_unlike(model, partial, folder)


def export_dense_(model: Any, tokenizer: Any, folder: Path, card: str = "", beside: Sequence[Path] = ()) -> None:
    """Merge every compressed module of a model in place, and write the model as an ordinary dense folder.

    Every tool can load the folder. It has the quality of the compressed model and the size of the original: removed
    rows and columns are zeros. The arguments are those of `export_model`.

    Raises:
        ValueError: the folder is in use or not empty.
        OSError: the folder cannot be written; nothing is left behind.
    """
    merge_(model, bare_model(model))
    model.tie_weights()
    with _whole(folder) as partial:
        _save(model, tokenizer, partial, card, beside)
        _state_rotation(partial)
        refuse_unlike(model, partial, folder)


def export_plain(model: Any, tokenizer: Any, folder: Path, card: str = "", beside: Sequence[Path] = ()) -> None:
    """Write a model with fewer hidden units or heads as a smaller model without code of ours, see `plain_model`.

    The folder of a DeciLM model brings the files that transformers and mlx-lm need for it. The arguments are those of
    `export_model`.

    Raises:
        ValueError: as `search.export.plain.plain_model`; or the folder is in use or not empty.
        OSError: the folder cannot be written; nothing is left behind.
    """
    small = plain_model(model)
    with _whole(folder) as partial:
        _save_plain(small, tokenizer, partial, card, beside)
        refuse_unlike(model, partial, folder, small)


def export_integers(
    model: Any, tokenizer: Any, folder: Path, kind: str, card: str = "", beside: Sequence[Path] = ()
) -> None:
    """Write a model of plain and rounded matrices, whose integers stay as they are, for an engine; it is read back.

    Args:
        model: as for `search.export.integers.integer_model`.
        kind: one of `INTEGERS`.

    Raises:
        ValueError: as `integer_model`; or the folder is in use or not empty.
        OSError: the folder cannot be written; nothing is left behind.
    """
    small, settings = integer_model(model, kind)
    with _whole(folder) as partial:
        _save_plain(small, tokenizer, partial, card, beside)
        _state(partial, settings)
        _refuse_other_tensors(model, small, kind, partial, folder)


def _refuse_other_tensors(model: Any, small: Any, kind: str, partial: Path, folder: Path) -> None:
    """Refuse a folder whose tensors are not those of a model, or whose integers stand for other matrices."""
    found = {name: values for file in partial.glob("*.safetensors") for name, values in load_file(file).items()}
    tensors = small.state_dict()
    written = {tensors[name].data_ptr() for name in found.keys() & tensors.keys()}
    wrong = [name for name, values in tensors.items() if name in found and not found[name].equal(values.cpu())]
    wrong += [name for name, values in tensors.items() if values.data_ptr() not in written]  # tied ones are there once
    for name, matrix in rounded_matrices(model).items() if not wrong else ():
        inside = {key.rpartition(".")[2]: values for key, values in found.items() if key.startswith(f"{name}.")}
        wrong += [] if stands_for(kind, inside, matrix) else [name]
    if wrong:
        raise Refusal(f"{folder} was written wrongly: {wrong[0]} differs; the disk may be faulty, so write it again")


def _save_plain(small: Any, tokenizer: Any, folder: Path, card: str, beside: Sequence[Path]) -> None:
    """Save a plain model, with the code that a DeciLM model needs."""
    _save(small, tokenizer, folder, card, beside)
    _state_rotation(folder)
    if isinstance(small, DeciLMForCausalLM):
        for name in _DECI_FILES:
            shutil.copyfile(Path(modeling_deci.__file__).with_name(name), folder / name)
        _state(folder, _DECI)


def export_gguf(
    model: Any,
    tokenizer: Any,
    folder: Path,
    kind: str,
    card: Callable[[Path], str] = lambda file: "",
    beside: Sequence[Path] = (),
    **about: str,
) -> None:
    """Write a model without factors as a GGUF file in a new folder; the file is read back before the folder appears.

    Args:
        kind: type of the weights, one of `search.export.gguf_file.GGUF_TYPES`.
        card: makes the text of README.md from the file, which is finished by then; it may measure it.
        about: as for `search.export.gguf_file.write_gguf`.

    Raises:
        ValueError: as `write_gguf`; or the folder is in use or not empty.
        OSError: the folder cannot be written; nothing is left behind.
    """
    with _whole(folder) as partial:
        write_gguf(model, tokenizer, partial / GGUF, kind, **about)
        if text := card(partial / GGUF):
            (partial / CARD).write_text(text, encoding="utf-8")
        for file in beside:
            shutil.copyfile(file, partial / file.name)


def check_export(form: str, model: Any, tokenizer: Any) -> None:
    """Refuse a model that cannot be exported in a form, before any work is done for it; no weights are written.

    Args:
        form: one of `FORMATS`; any model can be exported as "dense".
        model: the dense or the compressed model.

    Raises:
        ValueError: form "hf" needs an architecture that transformers defines itself; "gguf-ready" needs one that
            llama.cpp converts, and a tokenizer with a tokenizer.json; "gguf" needs what `check_gguf` asks for; or
            transformers cannot save the model's settings or tokenizer.
    """
    _check_form(form, model, tokenizer)
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        try:
            for part in (model.config, getattr(model, "generation_config", None), tokenizer):
                if part is not None:
                    part.save_pretrained(folder)
        except OSError:
            raise
        except Exception as error:  # the library raises many kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Refusal(f"transformers cannot save this model: {reason}; correct the files of the model") from error


def _check_form(form: str, model: Any, tokenizer: Any) -> None:
    """Refuse a model that cannot be exported in a form.

    Raises:
        ValueError: form "hf" needs an architecture that transformers defines itself; "gguf-ready" needs one that
            llama.cpp converts, and a tokenizer with a tokenizer.json.
    """
    if form in ("hf", "plain", *INTEGERS) and is_own_architecture(model):
        raise Refusal(
            f"the {form} format needs an architecture that transformers defines, and {type(model).__name__} comes with "
            "the model; export it as dense"
        )
    if form == "gguf":
        check_gguf(model, tokenizer)
    if form in INTEGERS:
        check_integers(model, form)
    if form != "gguf-ready":
        return
    if (architecture := type(model).__name__) not in CONVERTIBLE:
        raise Refusal(
            f"llama.cpp's converter takes no {architecture} (as of {SOURCE}); give a later converter the folder of "
            "--format dense --dtype float16"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise Refusal("the tokenizer must be a fast one, which has a tokenizer.json, and this one is not")


def _save(model: Any, tokenizer: Any, folder: Path, card: str, beside: Sequence[Path]) -> None:
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    original = Path(str(getattr(tokenizer, "name_or_path", "")))
    for name in _COPIED:
        if (original / name).is_file() and not (folder / name).exists():
            shutil.copyfile(original / name, folder / name)
    for file in folder.glob("*.json"):
        _drop_absent_code(file)
    if card:
        (folder / CARD).write_text(card, encoding="utf-8")
    for file in beside:
        shutil.copyfile(file, folder / file.name)


def _is_served(model: Any) -> bool:
    """Whether an engine can make the model from its configuration: it is causal, and all of it is language.

    The name in `architectures` must not change as what the folder is loaded.
    """
    config = model.config
    if config.get_text_config() is not config or not hasattr(config, "num_attention_heads"):
        return False
    try:
        return kind_of("", {**config.to_dict(), "architectures": [ARCHITECTURE]}) is kind_of_model(model) is Kind.CAUSAL
    except Refusal:
        return False


def _state(folder: Path, values: Mapping[str, object]) -> None:
    """Put values into the config.json of a folder."""
    file = folder / "config.json"
    document = json.loads(file.read_text(encoding="utf-8")) | values
    file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _state_rotation(folder: Path) -> None:
    """Put the settings of rotary positions into config.json under the names of transformers 4 too.

    Programs that do not know `rope_parameters`, such as mlx-lm 0.32 for Llama and Qwen2, would compute with the base
    10,000 and say nothing. Settings for each type of layer have no such names.
    """
    document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values = _rotation(document)
    if language := _rotation(document.get("text_config") or {}):
        values["text_config"] = document["text_config"] | language
    _state(folder, values)


def _rotation(settings: Mapping[str, Any]) -> dict[str, object]:
    stated = settings.get("rope_parameters") or {}
    found = {name: stated[name] for name in ("rope_theta", "partial_rotary_factor") if name in stated}
    if found and stated.get("rope_type", "default") != "default":
        found["rope_scaling"] = {name: value for name, value in stated.items() if name not in found}
    return found


def _drop_absent_code(file: Path) -> None:
    """Remove from a JSON file the references to code that is not in its folder; transformers would refuse to load it.

    `auto_map` names a class, or a list of classes or null, as MODULE.CLASS or REPOSITORY--MODULE.CLASS.
    """
    document = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or "auto_map" not in document:
        return
    given = document.pop("auto_map")
    named = given.items() if isinstance(given, dict) else ()
    kept = {kind: found for kind, found in named if all(_is_beside(file, each) for each in _listed(found))}
    if kept != given:
        document = {**document, "auto_map": kept} if kept else document
        file.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _listed(found: object) -> list[object]:
    return found if isinstance(found, list) else [found]


def _is_beside(file: Path, reference: object) -> bool:
    """Whether a reference of `auto_map` is null or a class of a module beside `file`."""
    return reference is None or (file.parent / f"{str(reference).rpartition('.')[0]}.py").is_file()


@contextmanager
def _plugged_in(model: Any, modules: Mapping[str, Any]) -> Iterator[None]:
    """Attach the plug-in that writes compressed tensors, and store linear layers as the architecture stores them."""
    skeleton = bare_model(model)
    original: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name == other or name.startswith(f"{other}.") for other in modules)
        if not inside and isinstance(module, nn.Linear) and not isinstance(skeleton.get_submodule(name), nn.Linear):
            original[name] = module
    before = {key: vars(owner).get(key) for owner, key in _attached(model)}
    quantizer = ChiselQuantizer(ChiselConfig(modules))
    try:
        for name in original:
            merge_(model, skeleton, only=name)
        model.hf_quantizer, model.config.quantization_config = quantizer, quantizer.quantization_config
        yield
    finally:
        for owner, key in _attached(model):
            if before[key] is None:
                vars(owner).pop(key, None)
            else:
                setattr(owner, key, before[key])
        for name, module in original.items():
            model.set_submodule(name, module)


def _attached(model: Any) -> list[tuple[Any, str]]:
    return [
        (model, "hf_quantizer"),
        (model, "_weight_conversions"),
        (model.config, "quantization_config"),
        (model.config, "auto_map"),
    ]


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that is renamed to `folder` once complete and removed if anything fails."""
    folder = folder.absolute()
    refuse_used(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder.parent, folder.name) as partial:
        with system_errors(folder):
            yield partial
        partial.chmod(0o755)
        if folder.exists():
            refuse_used(folder)
            shutil.rmtree(folder)
        partial.rename(folder)
