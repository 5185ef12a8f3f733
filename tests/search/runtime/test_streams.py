import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compression.refusal import Refusal
from search import cli
from search.runtime.streams import lost, read_input, sturdy_streams, typed

ROOT = Path(__file__).parents[3]
HELP = [sys.executable, str(ROOT / "search.py"), "prior", "--help"]
MISTAKE = [sys.executable, str(ROOT / "search.py"), "serch"]


class Failing(io.StringIO):
    """A stream that takes nothing, like a pipe without a reader or a file on a full disk."""

    def __init__(self, number):
        super().__init__()
        self.number, self.tries = number, 0

    def write(self, text):
        self.tries += 1
        raise OSError(self.number, os.strerror(self.number))


def encoded(encoding):
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")


def content(stream):
    stream.flush()
    return stream.buffer.getvalue()


@pytest.mark.parametrize(
    ("encoding", "written"),
    [("ascii", b"chi 5 +-1 \\u9435 caf\\xe9"), ("latin-1", b"chi 5 \xb11 \\u9435 caf\xe9")],
)
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_characters_that_an_encoding_lacks_are_written_in_others(encoding, written, name, monkeypatch):
    stream = encoded(encoding)
    monkeypatch.setattr(sys, name, stream)
    with sturdy_streams():
        print("χ 5 ±1 鐵 café", end="", file=getattr(sys, name))
    assert content(stream) == written


def test_bytes_of_a_file_name_that_are_no_text_are_printed_as_they_are(monkeypatch):
    stream = encoded("utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    with sturdy_streams():
        print(Path(os.fsdecode(b"caf\xe9")), end="")
    assert content(stream) == b"caf\xe9"


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF])
def test_a_stream_that_takes_nothing_is_given_up_and_work_goes_on(number, monkeypatch):
    stream = Failing(number)
    monkeypatch.setattr(sys, "stdout", stream)
    with sturdy_streams():
        for _ in range(3):
            print("text", flush=True)
        assert lost(sys.stdout).errno == number
    assert stream.tries == 1


@pytest.mark.parametrize("word", ["serch", "prior", "--help"])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_every_command_ends_alike_in_every_encoding(word, encoding, monkeypatch):
    streams = {}
    for name in ("stdout", "stderr"):
        streams[name] = encoded(encoding)
        monkeypatch.setattr(sys, name, streams[name])
    assert cli.main([word]) == (cli.DONE if word == "--help" else cli.REFUSED)
    assert content(streams["stdout" if word == "--help" else "stderr"])


def test_what_cannot_be_printed_is_said_and_gives_exit_code_4(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Failing(errno.ENOSPC))
    assert cli.main(["prior", "schema"]) == cli.FAILURES
    assert "standard output could not be written (No space left on device)" in capsys.readouterr().err


def test_a_refusal_goes_to_standard_output_if_standard_error_takes_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Failing(errno.EIO))
    assert cli.main(["serch"]) == cli.REFUSED
    assert capsys.readouterr().out.startswith("search.py: unknown command 'serch'")


@pytest.mark.parametrize("given", ["grüße χ".encode(), "grüße".encode("latin-1")])
def test_standard_input_is_utf_8_or_the_encoding_of_the_locale(given, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="latin-1"))
    assert read_input() in ("grüße χ", "grüße")


def test_input_that_is_no_text_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    with pytest.raises(Refusal, match="standard input must be UTF-8 text"):
        read_input()
    with pytest.raises(Refusal, match="prompt must be UTF-8 text"):
        typed(os.fsdecode(b"\xff"), "prompt")
    assert typed("grüße", "prompt") == "grüße"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "closed", "code", "out", "err"),
    [
        (HELP, "<&-", cli.DONE, "usage", ""),
        (HELP, ">&-", cli.DONE, "", "usage"),
        (HELP, "2>&-", cli.DONE, "usage", ""),
        (HELP, "<&- >&- 2>&-", cli.DONE, "", ""),
        (HELP, ">/dev/full", cli.FAILURES, "", "search.py: standard output could not be written"),
        (HELP, "| true", cli.DONE, "", "search.py: standard output could not be written"),
        (MISTAKE, "2>&-", cli.REFUSED, "search.py: unknown command", ""),
        (MISTAKE, ">&- 2>/dev/full", cli.REFUSED, "", ""),
    ],
)
def test_a_process_whose_streams_are_closed_full_or_broken(words, closed, code, out, err):
    script = " ".join(f"'{word}'" for word in words)
    if closed == "| true":  # the reader must be gone before the first write
        script = f"(sleep 0.1; {script}) {closed}"
    else:
        script = f"{script} {closed}"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert done.stdout.startswith(out)
    assert done.stderr.startswith(err)
    assert "Traceback" not in done.stderr
    assert (out == "") == (done.stdout == "")
    assert (err == "") == (done.stderr == "")
