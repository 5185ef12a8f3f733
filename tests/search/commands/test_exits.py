"""Every system error that names a path or a lack of the machine is one line; anything else is a fault of ours."""

import errno
import os
from pathlib import Path

import pytest

from search.commands.exits import FAILURES, FAULT, REFUSED, explain

LACKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.EBUSY)
PATHS = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)
PATHS += (errno.ELOOP, errno.ENXIO, errno.ENOTEMPTY, errno.EINVAL, errno.ETXTBSY, errno.EXDEV, errno.EILSEQ)


def told(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("code", LACKS)
def test_what_the_machine_lacks_stops_with_code_4_and_the_resume_command(
    code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(OSError(code, os.strerror(code))) == FAILURES
    assert os.strerror(code) in told(capsys)
    assert explain(OSError(code, os.strerror(code), "/data/x"), ["--resume", "run"], tmp_path) == FAILURES
    err = told(capsys)
    assert f"{os.strerror(code)}: /data/x" in err
    assert "continue with: python search.py --resume run" in err


@pytest.mark.parametrize("code", PATHS)
def test_an_error_of_a_path_is_refused_before_there_is_a_run_and_stops_a_run_afterwards(
    code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = OSError(code, os.strerror(code), "/data/x")
    assert explain(error) == REFUSED
    assert told(capsys) == f"search.py: cannot use /data/x: {os.strerror(code)}\n"
    assert explain(error, ["--resume", "run"], tmp_path) == FAILURES
    assert "/data/x" in told(capsys)


def test_a_system_error_inside_the_error_of_a_library_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    wrapped = RuntimeError("the library failed")
    wrapped.__cause__ = FileNotFoundError(errno.ENOENT, "No such file", "/nowhere/at/all")
    assert explain(wrapped) == REFUSED
    assert "/nowhere/at/all" in told(capsys)
    assert explain(RuntimeError(f"I/O error: nothing left (os error {errno.EMFILE})")) == FAILURES
    assert os.strerror(errno.EMFILE) in told(capsys)


@pytest.mark.parametrize("error", [OSError("odd"), OSError(errno.EBADF, "Bad file descriptor"), RuntimeError("odd")])
def test_an_error_without_a_path_is_still_a_fault_of_ours(
    error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(error, folder=tmp_path) == FAULT
    assert "fault of Chisel" in told(capsys)
    assert type(error).__name__ in (tmp_path / "run.log").read_text()


def test_a_log_that_is_a_fifo_does_not_hang(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "run.log")
    assert explain(RuntimeError("odd"), folder=tmp_path) == FAULT
    assert capsys.readouterr().err.startswith("RuntimeError: odd")
