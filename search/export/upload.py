"""Upload of an exported folder to the hub."""

from __future__ import annotations

import re
from pathlib import Path

from compression.refusal import Refusal
from search.runtime.errors import DataUnavailable

__all__ = ["push"]

_REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
_NEEDED = ("config.json", "README.md", "model.safetensors*")


def push(folder: Path, repository: str, public: bool = False) -> str:
    """Upload every file of an exported folder; returns the address.

    Raises:
        ValueError: a name that is not OWNER/NAME, or a folder that lacks a config, a model card or weights.
        DataUnavailable: the hub cannot be reached, or does not let this account write there.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise Refusal(f"repository must be OWNER/NAME, got {repository!r}")
    if absent := [name for name in _NEEDED if not any(folder.glob(name))]:
        raise Refusal(f"{folder} has no {absent[0]}; push a folder that search.py export made")
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Exported by Chisel")
    except Exception as error:  # the hub's client raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataUnavailable(f"cannot push to {repository}: {reason}; log in with: hf auth login") from error
    return str(commit.repo_url)
