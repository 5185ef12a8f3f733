"""A finished run that was changed, or whose model was, is refused by every later command and told what differs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_data import data_for_processes
from safetensors.torch import load_file, save_file
from small_run import HEAL, words

from search import api, cli
from search.model.loading import load_model
from search.priors.format import PriorSite
from search.runtime.run_digest import refuse_changed

Edit = Callable[[Path], object]


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded = load_model("random:tiny-llama", "cpu")
    path = tmp_path_factory.mktemp("models") / "tiny"
    loaded.model.save_pretrained(path)
    loaded.tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model: Path, patch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    data_for_processes(folder, patch)
    assert cli.main(words(out=folder / "run", model=model, budget=0, agent="lagrangian", **HEAL)) == cli.DONE
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "moved"))


def commands(run: Path, out: Path) -> list[list[str]]:
    return [
        ["export", str(run), "--out", str(out / "exported"), "--device", "cpu", "--quiet"],
        ["benchmark", str(run), "--tasks", "boolq", "--samples", "2", "--out", str(out / "b"), "--quiet"],
        ["heal", str(run), "--tokens", "300", "--row-tokens", "32", "--out", str(out / "healed-more"), "--quiet"],
    ]


def in_json(name: str, change: Callable[[dict[str, Any]], object]) -> Edit:
    def edit(run: Path) -> None:
        document = json.loads((run / name).read_text())
        change(document)
        (run / name).write_text(json.dumps(document))

    return edit


def setting(name: str, **values: object) -> Edit:
    return in_json(name, lambda document: document.update(values))


def lower_chi(document: dict[str, Any]) -> None:
    site = next(site for site in document["sites"] if site["topology"] != "dense")
    site["chi"] -= 1
    document["schedule_digest"] = None


def rename_row(document: dict[str, Any]) -> None:
    next(row for row in document["scores"] if row["schedule"] == "repaired")["schedule"] = "something"


CHANGES: dict[str, tuple[Edit, str]] = {
    "calibration_tokens": (
        setting("config.json", calibration_tokens=1600),
        "calibration_tokens of config.json was 1500, is 1600",
    ),
    "seed": (setting("config.json", seed=3), "seed of config.json was 0, is 3"),
    "repair_tokens": (setting("config.json", repair_tokens=600), "repair_tokens of config.json was 512, is 600"),
    "model": (setting("config.json", model="random:tiny-llama"), "model of config.json"),
    "a field removed": (in_json("config.json", lambda document: document.pop("seed")), "seed of config.json was 0"),
    "healing removed": (lambda run: (run / "healed" / "healing.json").unlink(), "healed/healing.json was removed"),
    "healing changed": (setting("healed/healing.json", stopped="x"), 'stopped of healed/healing.json was "", is "x"'),
    "row renamed": (in_json("prior.json", rename_row), "scores of prior.json differs"),
    "schedule": (in_json("prior.json", lower_chi), "sites of prior.json differs"),
    "table": (in_json("summary.json", lambda summary: summary["rows"][-1].update(kl=0.0)), "rows of summary.json"),
    "summary removed": (lambda run: (run / "summary.json").unlink(), "summary.json was removed"),
    "not JSON": (lambda run: (run / "summary.json").write_text("{"), "summary.json cannot be read"),
    "digest removed": (lambda run: (run / "digest.json").unlink(), "has no digest.json: the run did not finish, or"),
    "digest changed": (
        in_json("digest.json", lambda document: document["made_of"]["config.json"].update(seed=3)),
        "digest.json was changed",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHANGES)
def test_a_run_that_was_changed_is_refused_by_name_before_anything_is_loaded(
    kind: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit, said = CHANGES[kind]
    edit(run)
    monkeypatch.setattr("search.experiment.open_model.load_model", lambda *_: pytest.fail("a model was loaded"))
    later = commands(run, tmp_path)
    if kind != "summary removed":
        later.append(["report", str(run)])
        with pytest.raises(api.Refusal):
            api.open_run(run)
    for command in later:
        assert cli.main(command) == cli.REFUSED, command
        error = capsys.readouterr().err
        if kind != "not JSON":
            assert said in error
            assert f"python search.py resume {run}" in error
        assert error.count("\n") == 1
    assert not list(tmp_path.glob("exported*"))


@pytest.mark.slow
def test_what_does_not_change_the_results_may_change(run: Path, tmp_path: Path, model: Path) -> None:
    setting("config.json", budget=7, threads=1, benchmark_items=9, export="hf", device="cpu")(run)
    for name in ("prior.json", "summary.json"):
        in_json(name, lambda document: None)(run)  # only the layout of the file
    shutil.rmtree(run / "repaired")  # made again if it is needed
    assert cli.main(commands(run, tmp_path)[0]) == cli.DONE
    assert "| healed |" in (tmp_path / "exported" / "README.md").read_text()
    assert api.open_run(run).table()["schedule"].iloc[-1] == "healed"


def test_a_run_of_an_earlier_version_is_read_and_said_to_be_unchecked(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text('{"commit": null}')
    said: list[str] = []
    assert refuse_changed(tmp_path, said.append) == {}
    assert [line for line in said if "earlier version" in line] == said != []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("healing removed", "has the row healed, but the run was not healed"),
        ("row renamed", "has the row repaired, but the run was not repaired"),
        ("schedule", "prior.json was edited by hand"),
    ],
)
def test_without_a_digest_a_state_that_the_table_contradicts_is_refused_too(
    kind: str, said: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "digest.json").unlink()  # as earlier versions left a run
    in_json("environment.json", lambda document: document.pop("digest"))(run)
    if kind == "row renamed":
        shutil.rmtree(run / "healed")
        in_json("summary.json", lambda summary: summary["rows"].pop())(run)
    CHANGES[kind][0](run)
    if kind == "schedule":
        in_json("prior.json", fit_sizes)(run)
    assert cli.main(commands(run, tmp_path)[0]) == cli.REFUSED
    assert said in capsys.readouterr().err


def fit_sizes(document: dict[str, Any]) -> None:
    """Make the sizes in an edited prior those of its sites, as a careful editor does."""
    for site in document["sites"]:
        site["parameters"] = PriorSite.model_validate_json(json.dumps(site)).stored
    stored, whole = (sum(sizes) for sizes in zip(*map(sizes_of, document["sites"]), strict=True))
    document["kept_fraction"] = stored / whole


def sizes_of(site: dict[str, Any]) -> tuple[int, int]:
    return site["parameters"], site["shape"][0] * site["shape"][1]


@contextmanager
def changed(folder: Path, edit: Edit) -> Iterator[None]:
    """The model folder with an edit, and afterwards as it was."""
    before = {path: path.read_bytes() for path in folder.iterdir()}
    try:
        edit(folder)
        yield
    finally:
        for path, content in before.items():
            path.write_bytes(content)


def other_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (other_weights, "with other weights than the model has now"),
        (setting("config.json", rms_norm_eps=1e-2), "with other config.json than"),
        (setting("config.json", hidden_act="relu"), "with other config.json than"),
        (setting("tokenizer_config.json", model_max_length=7), "with other tokenizer than"),
    ],
)
def test_a_model_that_was_replaced_under_its_name_is_refused(
    edit: Edit, said: str, run: Path, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with changed(model, edit):
        for command in commands(run, tmp_path):
            assert cli.main(command) == cli.REFUSED, command
            error = capsys.readouterr().err
            assert said in error
            assert error.count("\n") == 1
    assert not (tmp_path / "exported").exists()


@pytest.mark.slow
def test_a_lone_prior_and_a_resumed_search_refuse_the_replaced_model_too(
    run: Path, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lone = tmp_path / "lone.json"
    shutil.copy(run / "prior.json", lone)
    benchmark = ["benchmark", str(lone), "--tasks", "boolq", "--samples", "2", "--out", str(tmp_path / "out")]
    for edit, said, part in (
        (other_weights, "other weights", "model was"),
        (setting("config.json", rms_norm_eps=1e-2), "other config.json", "architecture was"),
    ):
        with changed(model, edit):
            for command, complaint in ((benchmark, said), (["resume", str(run)], part)):
                assert cli.main([*command, "--quiet"]) == cli.REFUSED
                assert complaint in capsys.readouterr().err


@pytest.mark.slow
def test_an_exported_folder_is_healed_towards_its_own_dense_model_only(
    run: Path, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*commands(run, tmp_path)[0], "--dtype", "float32"]) == cli.DONE
    capsys.readouterr()
    for edit, said in ((other_weights, "other weights"), (setting("config.json", rms_norm_eps=1e-2), "config.json")):
        with changed(model, edit):
            heal = ["heal", str(tmp_path / "exported"), "--model", str(model), "--tokens", "300", "--quiet"]
            assert cli.main(heal) == cli.REFUSED
            assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_healing_does_not_change_the_run_it_heals(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = ["heal", str(run), "--tokens", "64", "--row-tokens", "32", "--batch-tokens", "64", "--quiet", "--out"]
    assert cli.main([*inside, str(run / "healed")]) == cli.REFUSED
    assert "kept for the healing of the run itself" in capsys.readouterr().err
    shutil.rmtree(run / "repaired")
    more = run / "healed-more"
    assert cli.main([*inside, str(more)]) == cli.DONE
    refuse_changed(run)
    export = [*commands(run, tmp_path)[0], "--healed", str(more)]
    in_json(f"{more.name}/healing.json", lambda document: document["rows"][-1].update(kl=0.0))(run)
    assert cli.main(export) == cli.REFUSED
    assert "healing.json was changed" in capsys.readouterr().err


@pytest.mark.slow
def test_the_card_of_another_healing_has_the_figures_of_that_healing(run: Path, tmp_path: Path) -> None:
    more = tmp_path / "healed-more"
    assert cli.main(commands(run, tmp_path)[2]) == cli.DONE
    assert cli.main([*commands(run, tmp_path)[0], "--healed", str(more)]) == cli.DONE
    card = (tmp_path / "exported" / "README.md").read_text()
    [row] = [row for row in json.loads((more / "healing.json").read_text())["rows"] if row["schedule"] == "healed"]
    [line] = [line for line in card.splitlines() if line.startswith("| healed (healed-more) |")]
    assert f"{row['kl']:.4f}" in line
    assert "model is the last row of the table" in card
