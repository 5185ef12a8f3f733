"""GGUF models in several files: the same as in one, from any file of them, or refused with advice that helps."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import pytest
import torch
from tiny_gguf import written

from search.model.loading import load_model
from search.model.source_files import SourceFiles
from search.model.sources import locate


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    written(folder / "tiny.gguf", 12)
    assert len(list(folder.glob("tiny-0000?-of-00003.gguf"))) == 3
    return folder


def copied(shards: Path, folder: Path, without: int = 0) -> Path:
    for file in shards.iterdir():
        if not file.name.startswith(f"tiny-0000{without}"):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_model_in_three_files_is_the_model_in_one(shards: Path, tmp_path: Path) -> None:
    written(tmp_path / "tiny.gguf")
    whole, found = load_model(str(tmp_path / "tiny.gguf"), "cpu"), load_model(str(shards), "cpu")
    assert found.digest == whole.digest
    ids = torch.tensor([found.encode("Question: why?")])
    assert torch.equal(found.model(ids).logits, whole.model(ids).logits)


def test_any_file_of_a_model_names_all_of_them(shards: Path) -> None:
    for number in (1, 2, 3):
        source = locate(str(shards / f"tiny-0000{number}-of-00003.gguf"))
        assert (source.gguf, source.model_id) == ("tiny-00001-of-00003.gguf", "tiny")
    assert gguf.GGUFReader.__name__ == "GGUFReader"


@pytest.mark.parametrize("without", [1, 2, 3])
def test_a_missing_file_is_named(shards: Path, tmp_path: Path, without: int) -> None:
    folder = copied(shards, tmp_path, without)
    other = next(folder.iterdir())
    for name in (folder, other):
        with pytest.raises(ValueError, match=rf"tiny-0000{without}-of-00003\.gguf is missing; copy it"):
            locate(str(name))


def test_a_file_that_lost_its_number_is_refused_with_the_name_it_needs(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "renamed.gguf").write_bytes((shards / "tiny-00001-of-00003.gguf").read_bytes())
    with pytest.raises(
        ValueError, match=r"renamed\.gguf is one of 3 files of a model; name them as NAME-00001-of-00003"
    ):
        load_model(str(tmp_path), "cpu")


def test_files_of_two_models_are_not_joined(shards: Path, tmp_path: Path) -> None:
    folder = copied(shards, tmp_path)
    (folder / "tiny-00002-of-00003.gguf").write_bytes((folder / "tiny-00003-of-00003.gguf").read_bytes())
    with pytest.raises(ValueError, match="is not shard 2 of the 3 shards"):
        load_model(str(folder), "cpu")


def test_of_two_models_in_a_folder_one_can_be_named_as_the_message_says(shards: Path, tmp_path: Path) -> None:
    folder = copied(shards, tmp_path)
    (folder / "zother.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds 2 GGUF models; name one of them, such as (.*)$") as refused:
        locate(str(folder))
    advice = str(refused.value).rpartition("such as ")[2]
    assert locate(advice).gguf == "tiny-00001-of-00003.gguf"


def test_a_change_in_any_file_is_another_model(shards: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shards, tmp_path / "copy"))
    files = sorted(folder.glob("*.gguf"))
    before = SourceFiles.of(locate(str(files[0])))
    content = bytearray(files[-1].read_bytes())
    content[-1] ^= 1
    files[-1].write_bytes(content)
    assert SourceFiles.of(locate(str(files[0]))).architecture != before.architecture
