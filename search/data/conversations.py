"""Reads instruction data: conversations from local files or the hub, with the answers marked as the parts to learn.

Knows the Alpaca and chat layouts in JSON, JSON lines and parquet; does not know rows or losses. Alpaca records have
`instruction`, `input` (may be missing) and `output`. Chat records have `messages` or `conversations`, a list of {role,
content} or {from, value}. pyarrow reads parquet, and no code that comes with a data set is ever run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from compression.refusal import Refusal
from compression.storage.strict_json import parse
from compression.storage.whole_files import read_file, read_lines, regular
from search.data import hub
from search.runtime.errors import DataUnavailable
from search.runtime.files import user_path

__all__ = [
    "FILES",
    "MOST",
    "SHORT",
    "Document",
    "apply_template",
    "check_source",
    "conversation",
    "find_files",
    "plain_turns",
    "read_conversations",
    "records",
    "sources",
    "turns_of",
]

FILES = (".json", ".jsonl", ".parquet")
SHORT = {
    "alpaca": "tatsu-lab/alpaca",
    "ultrachat": "HuggingFaceH4/ultrachat_200k",
    "openhermes": "teknium/OpenHermes-2.5",
}
MOST = 200_000
"""Largest number of conversations that are read, far more than healing uses; it trains for less than one epoch."""
_LARGEST = 1 << 30
"""Bytes of the largest .json file that is accepted, since such a file is read into memory at once."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_LONGEST = 1 << 24
"""Characters of the longest line of a .jsonl file that is accepted."""
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}


@dataclass(frozen=True)
class Document:
    """A training text in parts (text, wanted); the model learns to predict wanted parts only, such as answers."""

    parts: tuple[tuple[str, bool], ...]

    @classmethod
    def plain(cls, text: str) -> Document:
        """Make a document of one part that is wanted."""
        return cls(((text, True),))

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(part for part, _ in self.parts)


def sources(names: str) -> list[str]:
    """Return the sources that a value of `--data` names: several are joined by "+", unless that is an existing file."""
    return [names] if Path(names).expanduser().exists() else names.split("+")


def check_source(name: str) -> None:
    """Refuse a source that cannot exist, without reading it or asking the hub.

    Args:
        name: "text", "sampled", or as for `read_conversations`.

    Raises:
        ValueError: a file does not exist, or the name is none of these and no hub id.
    """
    path = Path(name).expanduser()
    if path.suffix in FILES:
        if not path.is_file():
            raise Refusal(f"data must be an existing file if it ends with {path.suffix}, got {name!r}")
    elif name not in ("text", "sampled", *SHORT) and name.lower() not in SHORT and not _HUB_ID.fullmatch(name):
        raise Refusal(
            f"data must be text, sampled, {', '.join(SHORT)}, a {', '.join(FILES)} file or a hub id, got {name!r}"
        )


def read_conversations(source: str, tokenizer: Any) -> list[Document]:
    """Read conversations and format them with the model's chat template, or as Alpaca does if there is none.

    Args:
        source: a .json, .jsonl or .parquet file, a hub id, or alpaca, ultrachat or openhermes.
        tokenizer: the model's tokenizer; it may have a `chat_template`.

    Raises:
        ValueError: the source does not exist, a file is unreadable, or a record, whose number is given, has neither
            layout.
        DataUnavailable: the hub cannot be reached.
    """
    path = user_path(source)
    files = [path] if path.suffix in FILES else find_files(SHORT.get(source.lower(), source))
    found = (record for file in files for record in records(file))
    documents = [_document(record, where, tokenizer) for where, record in islice(found, MOST)]
    if not documents:
        raise Refusal(f"data {source!r} holds no conversation")
    return documents


def apply_template(tokenizer: Any, messages: Sequence[Mapping[str, str]], **options: Any) -> Any:
    """Format messages with the model's chat template.

    Args:
        messages: turns of `role` and `content`.
        options: as for the tokenizer's `apply_chat_template`.

    Raises:
        Refusal: the template refuses these messages or cannot be run; it is a program, which may raise anything.
    """
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except Exception as error:
        reason = " ".join((str(error).strip() or type(error).__name__).split())
        roles = ", ".join(dict.fromkeys(turn["role"] for turn in messages))
        raise Refusal(f"the model's chat template refuses a conversation of {roles}: {reason:.200}") from error


def conversation(record: object, where: str) -> list[tuple[str, str]]:
    """Return the turns (role, text) of a record; roles are system, user and assistant, and the last is assistant.

    Args:
        record: a record of the data set.
        where: location of the record, for messages.

    Raises:
        ValueError: the record has neither layout, or no answer.
    """
    turns = turns_of(record, where, "instruction and output, or messages")
    while turns and turns[-1][0] != "assistant":
        turns.pop()
    if not any(role == "assistant" and text.strip() for role, text in turns):
        raise Refusal(f"{where}: holds no answer to learn from")
    return turns


def turns_of(record: object, where: str, wanted: str) -> list[tuple[str, str]]:
    """Return the turns (role, text) of a record; roles are system, user and assistant.

    Args:
        record, where: as for `conversation`.
        wanted: the fields that a record must have, for messages.

    Raises:
        ValueError: the record has neither layout.
    """
    if not isinstance(record, Mapping):
        raise Refusal(f"{where}: must be an object, got {record!r:.60}")
    if "output" in record and "instruction" in record:
        extra = record.get("input")
        question = f"{record['instruction']}\n\n{extra}" if extra else str(record["instruction"])
        turns = [("user", question), ("assistant", str(record["output"]))]
    else:
        turns = []
        messages = record.get("messages", record.get("conversations"))
        if not isinstance(messages, list):
            raise Refusal(f"{where}: must have {wanted}, got {sorted(map(str, record))!r:.80}")
        for message in messages:
            if not isinstance(message, Mapping):
                raise Refusal(f"{where}: every message must be an object, got {message!r:.60}")
            role = str(message.get("role", message.get("from")))
            role, text = _ROLES.get(role, role), message.get("content", message.get("value"))
            if role not in ("system", "user", "assistant") or not isinstance(text, str):
                raise Refusal(f"{where}: a message needs a role (system, user, assistant) and text, got {role!r}")
            turns.append((role, text))
    return turns


def plain_turns(turns: list[tuple[str, str]]) -> list[tuple[str, bool]]:
    """Return the parts (text, whether it is an answer) of a conversation as Alpaca writes it."""
    titles = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}
    return [
        part for role, text in turns for part in ((titles[role], False), (f"{text.strip()}\n\n", role == "assistant"))
    ]


def _document(record: object, where: str, tokenizer: Any) -> Document:
    """Return a record as a document in which the assistant's turns are wanted."""
    turns = conversation(record, where)
    try:
        return _formatted(turns, tokenizer)
    except Refusal as error:
        raise Refusal(f"{where}: {error}; leave such records out") from None


def _formatted(turns: list[tuple[str, str]], tokenizer: Any) -> Document:
    parts: list[tuple[str, bool]] = []
    if not getattr(tokenizer, "chat_template", None):
        return Document(tuple(plain_turns(turns)))
    written = ""
    for count, (role, _) in enumerate(turns, 1):
        if role != "assistant":
            continue
        asked = _templated(turns[: count - 1], tokenizer, True)
        answered = _templated(turns[:count], tokenizer, False)
        if not asked.startswith(written) or not answered.startswith(asked):
            # The template rewrites earlier turns.
            asked, answered = written, _templated(turns[:count], tokenizer, False)
        parts += [(asked[len(written) :], False), (answered[len(asked) :], True)]
        written = answered
    return Document(tuple(part for part in parts if part[0]))


def _templated(turns: list[tuple[str, str]], tokenizer: Any, prompt: bool) -> str:
    messages = [{"role": role, "content": text} for role, text in turns]
    return str(apply_template(tokenizer, messages, tokenize=False, add_generation_prompt=prompt))


def records(path: Path) -> Iterator[tuple[str, object]]:
    """Yield the records of a file with their places, for messages; `path` ends in one of `FILES`.

    Raises:
        ValueError: the file cannot be read; the message names it, and the line of a .jsonl file.
    """
    try:
        if path.suffix == ".jsonl":
            for number, line in read_lines(path, _LONGEST):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, _parsed(line, where)
            return
        if path.suffix == ".parquet":
            with open(path, "rb", opener=regular) as stored:
                rows = (row for batch in pq.ParquetFile(stored).iter_batches() for row in batch.to_pylist())
                for number, record in enumerate(rows, 1):
                    yield f"{path}, record {number}", record
            return
        if path.stat().st_size > _LARGEST:
            raise Refusal(f"data {str(path)!r} is larger than {_LARGEST >> 20} MB; write it as .jsonl")
        parsed = _parsed(read_file(path, _LARGEST).decode("utf-8-sig"), str(path))
        if not isinstance(parsed, list):
            raise Refusal(f"data {str(path)!r} must hold a JSON list of records")
        for number, record in enumerate(parsed, 1):
            yield f"{path}, record {number}", record
    except OSError as error:
        raise Refusal(f"data {str(path)!r} cannot be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, pa.ArrowException) as error:
        raise Refusal(
            f"data {str(path)!r} cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from None


def _parsed(text: str, where: str) -> object:
    try:
        return parse(text)
    except Refusal as error:
        raise Refusal(f"{where}: must be JSON ({error})") from None


def find_files(name: str) -> list[Path]:
    """Download the first parquet or JSON file of a data set on the hub that is not for testing or evaluation."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    check_source(name)
    try:
        files = sorted(file.rfilename for file in HfApi().dataset_info(name, timeout=hub.SECONDS).siblings or ())
        chosen = [file for file in files if file.endswith(FILES) and "test" not in file and "eval" not in file]
        if not chosen:
            raise Refusal(f"data set {name!r} holds no {', '.join(FILES)} file")
        kind = min((Path(file).suffix for file in chosen), key=(".parquet", ".jsonl", ".json").index)
        first = next(file for file in chosen if file.endswith(kind))
        return [Path(hf_hub_download(name, first, repo_type="dataset", etag_timeout=hub.SECONDS))]
    except (RepositoryNotFoundError, HFValidationError):
        raise Refusal(f"data {name!r} is neither a file here nor a data set on the hub") from None
    except ValueError:
        raise
    except Exception as error:  # the hub's client raises many kinds of exceptions when offline
        raise DataUnavailable(
            f"data {name!r} is not a file here and the hub cannot be reached; give a {', '.join(FILES)} file"
        ) from error
