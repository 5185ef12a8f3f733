"""Uploads an exported folder to the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from compression.refusal import Refusal
from search.export.forms import GGUF
from search.export.gguf_file import check_whole
from search.hf import verify_folder
from search.model.own_code import is_compressed
from search.runtime.errors import DataUnavailable

__all__ = ["push"]

_REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_NEEDED = ("config.json", "README.md", "model.safetensors*")
_NEEDED_GGUF = ("README.md", GGUF)


def push(folder: Path, repository: str, public: bool = False) -> str:
    """Upload every file of an exported folder and return the address of the repository.

    Args:
        repository: OWNER/NAME on the hub; created if it does not exist.
        public: make a new repository public; otherwise it is private.

    Raises:
        ValueError: `repository` is not OWNER/NAME, the folder has no README.md or weights or, unless these are a GGUF
            file, no config.json; or its config or weights have changed since they were exported.
        DataUnavailable: the hub cannot be reached, or does not let this account write there.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise Refusal(f"repository must be OWNER/NAME, got {repository!r}")
    needed = _NEEDED_GGUF if (folder / GGUF).exists() else _NEEDED
    if absent := [name for name in needed if not any(folder.glob(name))]:
        raise Refusal(f"{folder} has no {absent[0]}; push a folder that search.py export made")
    if (folder / GGUF).exists():
        check_whole(folder / GGUF)
    if is_compressed(folder):
        verify_folder(folder)
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Exported by Chisel")
    except Exception as error:  # the hub's client raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataUnavailable(f"cannot push to {repository}: {reason}; log in with: hf auth login") from error
    return str(commit.repo_url)
