"""Code that comes with a model: never run unless asked for, and then only the code that the run recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from own_code import CODE, model_with_code, run_afresh

from search.config import Config
from search.experiment.open_model import open_model
from search.experiment.user_files import check_files, with_digests
from search.model.devices import resolve_device
from search.model.loading import load_for_use, load_model
from search.model.remote_code import code_digests
from search.runtime.files import file_digest


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    run_afresh(monkeypatch, tmp_path)
    return model_with_code(tmp_path / "own")


def ran(folder: Path) -> bool:
    return any(folder.parent.rglob("ran"))


def test_by_default_a_model_with_its_own_code_is_refused_and_nothing_runs(folder: Path) -> None:
    for opened in (load_model, load_for_use):
        with pytest.raises(ValueError, match="own"):
            opened(str(folder), "cpu")
    assert not ran(folder)


def test_trusted_code_runs_is_recorded_and_refused_once_it_has_changed(folder: Path) -> None:
    cpu = resolve_device("cpu")
    config = with_digests(Config.of({"model": str(folder), "trust_remote_code": True, "dtype": "float32"}))
    assert config.digests == {"code/own_code.py": file_digest(folder / "own_code.py")}
    assert not ran(folder)
    loaded, _ = open_model(config, cpu)
    assert type(loaded.model).__name__ == "OwnModel"
    assert loaded.digest == load_model("random:tiny-llama", "cpu").digest
    assert ran(folder)
    kept = Config.of(json.loads(config.to_json()))
    assert kept == config
    for path in folder.parent.rglob("ran"):
        path.unlink()
    (folder / "own_code.py").write_text(f"{CODE}\n")
    for changed in (check_files, with_digests, lambda given: open_model(given, cpu)):
        with pytest.raises(
            ValueError, match=r"own_code\.py of .*/own is not what the run used: its sha256 was \w{16}, is"
        ):
            changed(kept)
    (folder / "own_code.py").write_text(CODE)
    (folder / "helper.py").write_text("")
    with pytest.raises(ValueError, match=r"helper\.py of .* was absent, is \w{16}"):
        open_model(kept, cpu)
    assert not ran(folder)


def test_code_of_another_repository_is_refused(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": [None, "a/b--tok.Fast"]}}))
    with pytest.raises(ValueError, match=r"refers to code of another repository \(a/b--tok.Fast in tokenizer_config"):
        code_digests(str(folder))


def test_a_model_without_code_may_be_trusted(tmp_path: Path) -> None:
    assert code_digests("random:tiny-llama") == {}
    assert with_digests(Config.of({"model": "random:tiny-llama", "trust_remote_code": True})).digests == {}
