"""A config that asks for what its weight files cannot hold, and a folder that cannot be read, are refused at once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from compression.refusal import Refusal
from search.model.loading import load_model
from search.model.own_code import is_compressed
from search.model.sources import locate


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    loaded = load_model("random:tiny-gpt2", "cpu")
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A model folder that a test may change; its weights are those of `saved`."""
    for file in saved.iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


def change(folder: Path, **fields: object) -> None:
    document = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(document))


def test_an_ordinary_folder_is_located(folder: Path) -> None:
    assert locate(str(folder)).folder == folder.resolve()


@pytest.mark.parametrize("field", ["n_layer", "num_hidden_layers", "num_layers", "num_nextn_predict_layers"])
@pytest.mark.parametrize("count", [10**5, 10**12, -1])
def test_a_number_of_blocks_that_the_files_cannot_hold_is_refused_without_building_them(
    field: str, count: int, folder: Path
) -> None:
    for fields in ({field: count}, {"text_config": {field: count}}):
        change(folder, **fields)
        with pytest.raises(Refusal, match=f"has a config whose {field} must be .*, got {count}$"):
            load_model(str(folder), "cpu")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' * 100_000, "[]", "{", '{"a": 1, "a": 2}'])
def test_a_config_that_is_no_plain_object_is_one_line(content: str, folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(content)
    assert not is_compressed(folder)
    with pytest.raises(Refusal, match="cannot use the config of model") as error:
        load_model(str(folder), "cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "README.md", "other.txt"])
def test_a_fifo_or_a_link_to_nothing_in_a_model_folder_is_named_and_does_not_hang(name: str, folder: Path) -> None:
    place = folder / name
    place.unlink(missing_ok=True)
    os.mkfifo(place)
    with pytest.raises(Refusal, match=f"{name} is a FIFO, not a file"):
        locate(str(folder))
    place.unlink()
    place.symlink_to(folder / "gone")
    with pytest.raises(Refusal, match=f"{name} is a symbolic link to a file that does not exist"):
        locate(str(folder))


def test_the_home_of_a_user_who_has_none_is_refused() -> None:
    with pytest.raises(Refusal, match="cannot find the folder '~nobody-of-this-name/m'"):
        locate("~nobody-of-this-name/m")
