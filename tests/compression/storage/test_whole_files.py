"""Reading never waits, whatever lies in the place of a file."""

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from compression.refusal import Refusal
from compression.storage.strict_json import parse, read_object
from compression.storage.whole_files import read_file, refuse_irregular, replace_file


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


ODD: dict[str, Callable[[Path], object]] = {
    "a FIFO": os.mkfifo,
    "a folder": Path.mkdir,
    "a socket": bound,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_file_is_refused_at_once_by_its_kind(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "x.json"
    ODD[kind](place)
    with pytest.raises(OSError) as error:
        read_file(place)
    assert error.value.filename is not None
    with pytest.raises(Refusal, match=r"cannot .* the thing .*x.json"):
        read_object(place, "the thing", 100)
    if kind == "a folder":
        refuse_irregular(tmp_path)
    else:
        with pytest.raises(Refusal, match=f"x.json is {kind}"):
            refuse_irregular(tmp_path)


def test_a_link_to_nothing_is_named_and_hidden_files_are_left_alone(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".editor")
    (tmp_path / "inner").mkdir()
    refuse_irregular(tmp_path)
    (tmp_path / "inner" / "w.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(Refusal, match=r"w.safetensors is a symbolic link to a file that does not exist"):
        refuse_irregular(tmp_path)


def test_a_file_over_the_limit_is_not_read_and_a_long_name_can_be_written(tmp_path: Path) -> None:
    place = replace_file(tmp_path / ("n" * 255), b"12345")
    assert read_file(place, 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes") as error:
        read_file(place, 4)
    assert error.value.errno == errno.EFBIG


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    assert read_object(replace_file(tmp_path / "x.json", b'\xef\xbb\xbf{"a": 1}'), "the thing", 100) == {"a": 1}


@pytest.mark.parametrize(
    "text", [r'"\ud800"', r'{"\udc00": 1}', r'["\ud83d\ud83d"]', "9" * 301, "[" + "9" * 5000 + "]"]
)
def test_half_a_surrogate_pair_and_a_number_without_use_are_refused(text: str) -> None:
    with pytest.raises(Refusal):
        parse(text)
    assert parse(r'["\ud83d\ude00", 18446744073709551615]') == ["😀", 2**64 - 1]
