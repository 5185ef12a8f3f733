"""Digests of the files that a model comes from, besides its weights: what they compute, and how text becomes tokens.

The digests are taken from the files, not from what transformers makes of them, so that they stay the same when
transformers is upgraded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import transformers

from compression.storage.strict_json import json_digest, read_object
from search.model.pretrained import Source
from search.runtime.files import file_digest
from search.runtime.remembered import Stamp, remembered_digest

__all__ = ["SourceFiles"]

_FREE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", "auto_map")
"""Fields of config.json that do not change what the model computes with given parameters."""
_TEXT = ("tokenizer*", "vocab*", "merges*", "special_tokens_map*", "added_tokens*", "chat_template*", "*.model")
"""Names of files that say how text becomes tokens and back."""
_LARGEST_FILE = 1 << 26  # bytes of config.json


@dataclass(frozen=True)
class SourceFiles:
    """The files of a model when it is loaded.

    Attributes:
        architecture: digest of config.json without what does not change results. For a model that its name determines,
            a digest of the name; for a GGUF file, which holds everything, a digest of the file.
        vocabulary: digest of the files of the tokenizer; otherwise as `architecture`.
        weights: the state of the weight files; None if there are none.
    """

    architecture: str
    vocabulary: str
    weights: Stamp | None

    @classmethod
    def of(cls, source: Source) -> SourceFiles:
        """The files of a source, as they are now.

        Raises:
            Refusal: config.json is not a JSON object.
            OSError: a file is missing.
        """
        folder = source.folder
        shards = source.gguf_files
        weights = None if folder is None else Stamp.of(shards or _weights(folder))
        if folder is None or source.name == "default":
            named = json_digest({"name": source.name})
            return cls(named, named, weights)
        if source.gguf is not None:
            digests = [remembered_digest(shard) for shard in shards]
            whole = digests[0] if len(digests) == 1 else json_digest(digests)
            return cls(whole, whole, weights)
        config = read_object(folder / "config.json", "the config of the model", _LARGEST_FILE)
        files = {path.name: file_digest(path) for pattern in _TEXT for path in folder.glob(pattern) if path.is_file()}
        own = {name: value for name, value in config.items() if name not in _FREE}
        return cls(json_digest(own), json_digest(files), weights)

    def remembered(self, what: str, compute: Callable[[], str]) -> str:
        """The digest of the loaded parameters, which is computed once for the same large files.

        Args:
            what: what was done to the parameters after they were read, such as the dtype.
            compute: returns the digest.
        """
        return compute() if self.weights is None else self.weights.remembered(self._whole(what), compute)

    def known(self, what: str) -> str | None:
        """The digest that `remembered` would return without computing it; None if it is not remembered."""
        return None if self.weights is None else self.weights.known(self._whole(what))

    def _whole(self, what: str) -> str:
        return f"{what}, {self.architecture}, transformers {transformers.__version__}"


def _weights(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.safetensors") if path.is_file()]
