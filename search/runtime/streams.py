"""Makes the standard streams fit for any command: closed, broken or full ones, and encodings without some characters.

What a command prints must never end its work. A character that the encoding lacks is written in other characters, and
what a stream cannot take is dropped and remembered. Knows streams; does not know what is written.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from compression.refusal import Refusal

__all__ = ["UNENCODABLE", "lost", "read_input", "sturdy_streams", "typed"]

UNENCODABLE = "chisel-plain"
"""Error handler of `sturdy_streams` for characters that an encoding lacks."""

_PLAIN = {
    "χ": "chi",
    "…": "...",
    "±": "+-",
    "×": "x",
    "·": "-",
    "→": "->",
    "–": "-",
    "−": "-",
    "½": "1/2",
    "✓": "*",
    "█": "#",
    **dict.fromkeys("▏▎▍▌▋▊▉", "|"),
    **dict.fromkeys(map(chr, range(0x2800, 0x2900)), "*"),  # a spinner of dots
    "ᵀ": "T",
    "\u2009": " ",
    "\u202f": " ",
    "\xa0": " ",
}


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """Write what cannot be encoded in plain characters: our own symbols by name, undecodable bytes of file names as
    they were, and everything else as an escape sequence."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":
        return bytes([ord(character) - 0xDC00]), error.start + 1
    plain = _PLAIN.get(character) or character.encode("ascii", "backslashreplace").decode("ascii")
    return plain, error.start + 1


codecs.register_error(UNENCODABLE, _plain)


class _Sturdy:
    """A text stream whose writes never raise: from the first system error on, everything is dropped.

    Attributes:
        lost: the first error; None while everything was written.
    """

    def __init__(self, stream: TextIO, lost: OSError | None = None) -> None:
        self._stream, self.lost = stream, lost

    def write(self, text: str) -> int:
        """Write a text; returns its length."""
        if self.lost is None:
            try:
                self._stream.write(text)
            except OSError as error:
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        if self.lost is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.lost = error
        with suppress(OSError):  # what is buffered goes nowhere, or Python would fail on it again at exit
            _point_nowhere(self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def sturdy_streams() -> Iterator[None]:
    """Make `sys.stdin`, `sys.stdout` and `sys.stderr` usable, and restore the three at the end.

    A closed standard input is empty. A closed standard output is the same stream as standard error. What would be
    printed on a closed standard error is dropped.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    _open_descriptors()
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    if sys.stderr is None:
        nowhere = os.fdopen(2, "w", encoding="utf-8", closefd=False)
        sys.stderr = cast(TextIO, _Sturdy(nowhere, OSError(errno.EBADF, "it is closed")))
    else:
        sys.stderr = _sturdy(sys.stderr)
    sys.stdout = sys.stderr if sys.stdout is None else _sturdy(sys.stdout)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdin, sys.stdout, sys.stderr = before


def lost(stream: TextIO) -> OSError | None:
    """The error at which a stream of `sturdy_streams` was given up, after a flush; None if everything was written."""
    stream.flush()
    return getattr(stream, "lost", None)


def read_input() -> str:
    """Everything on standard input.

    Raises:
        Refusal: it cannot be read, or is neither UTF-8 nor text in the encoding of the locale.
    """
    stream = sys.stdin
    try:
        if not isinstance(stream, io.TextIOWrapper):  # a caller's own stream of text
            return stream.read()
        content = stream.buffer.read()
    except OSError as error:
        raise Refusal(f"standard input cannot be read: {error.strerror}") from None
    return _decoded(content, "standard input", stream.encoding)


def typed(text: str, what: str) -> str:
    """A word of the command line, which the locale may have decoded wrongly, as UTF-8 text.

    Args:
        what: name of the word, for the message.

    Raises:
        Refusal: the word holds bytes that are not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return _decoded(text.encode(sys.getfilesystemencoding(), "surrogateescape"), what, None)
    return text


def _decoded(content: bytes, what: str, locale: str | None) -> str:
    for encoding in ("utf-8", locale or "utf-8"):
        with suppress(UnicodeDecodeError):
            return content.decode(encoding)
    raise Refusal(f"{what} must be UTF-8 text")


def _sturdy(stream: TextIO) -> TextIO:
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=UNENCODABLE)
        with suppress(OSError):  # a stream in memory has no descriptor
            os.set_blocking(stream.fileno(), True)  # a write to a slow reader waits for it
    return cast(TextIO, _Sturdy(stream))


def _open_descriptors() -> None:
    """Point closed standard descriptors nowhere, or the next file that is opened would be taken for one of them."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            _point_nowhere(number)


def _point_nowhere(number: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)  # takes the number itself if that is the lowest free one
    if null != number:
        os.dup2(null, number)
        os.close(null)
