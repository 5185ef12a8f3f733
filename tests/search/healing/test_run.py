"""The command heal on a finished run: a table before and after, weights that can be loaded, refusals in one line."""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_data import fake_data
from prior_document import document
from safetensors.torch import load_file
from small_run import words

from compression import MPOLinear, Schedule
from compression.bonds import discover_bonds, with_bonds
from compression.layers.skeleton import describe
from compression.sites import discover_sites
from search import cli
from search.config import Config
from search.evaluation.quality import Quality
from search.export.restore import restore
from search.healing import run as healing_run
from search.healing.plan import HealingOptions
from search.healing.repaired_start import repair_did_harm
from search.healing.run import held
from search.healing.sharding import sharing_copy
from search.healing.state import StoredWeights, load_sites_, site_tensors
from search.model.loading import load_for_use, load_model
from search.runtime.checkpoints import Checkpoints
from search.runtime.console import Console
from search.runtime.run_folder import RunFolder, contents, refuse_held
from search.runtime.signals import INTERRUPTED
from search.runtime.tensorboard import CURVES

__all__ = ["fake_data"]


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_a_finished_run_is_healed_and_its_weights_can_be_put_into_the_dense_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "a run é", tmp_path / "out"
    assert cli.main(words(out=run, budget=0, agent="lagrangian", repair_tokens=512)) == cli.DONE
    command = ["heal", str(run), "--tokens", "300", "--row-tokens", "32", "--batch-tokens", "64", "--out", str(out)]
    assert cli.main([*command, "--quiet"]) == cli.DONE
    state = json.loads((out / "healing.json").read_text())
    assert [row["schedule"] for row in state["rows"]] == ["dense", "repaired", "healed"]
    assert len({row["parameters"] for row in state["rows"][1:]}) == 1
    assert set(contents(out)) == {"healing.json", "weights.safetensors", CURVES}
    model = load_model("random:tiny-llama", "cpu").model
    sites, schedule = discover_sites(model), Schedule.from_json(json.dumps(state["schedule"]))
    sites = with_bonds(sites, discover_bonds(model, sites))
    load_sites_(model, sites, schedule, load_file(out / "weights.safetensors"))
    kinds = {isinstance(model.get_submodule(name), MPOLinear) for name, choice in schedule if not choice.is_plain}
    assert kinds == {True}
    assert torch.isfinite(model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits).all()
    whole = load_model("random:tiny-llama", "cpu").model
    ids = torch.arange(8)[None]
    dense = whole(input_ids=ids).logits
    outcome = restore(run, Console(quiet=True), "cpu", healed=out)
    assert outcome.state == "healed"
    undo = StoredWeights.read(out).put_(whole, sites, schedule)
    assert torch.equal(whole(input_ids=ids).logits, outcome.experiment.loaded.model(input_ids=ids).logits)
    assert not torch.equal(whole(input_ids=ids).logits, dense)
    undo()
    assert torch.equal(whole(input_ids=ids).logits, dense)
    cut = {name: value for name, value in load_file(out / "weights.safetensors").items() if "tail_0" not in name}
    with pytest.raises(ValueError, match="do not fit"):
        load_sites_(load_model("random:tiny-llama", "cpu").model, sites, schedule, cut)
    with pytest.raises(ValueError, match="another schedule"):
        StoredWeights.read(out).check(Schedule.dense(tuple(name for name, _ in schedule)), state["model"]["digest"])
    content = bytearray((out / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (out / "weights.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        restore(run, Console(quiet=True), "cpu", healed=out)


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_an_interrupted_healing_holds_its_folder_and_tells_the_command_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "a run", tmp_path / "healed é"
    assert cli.main(words(out=run, budget=0, agent="lagrangian", repair_tokens=512)) == cli.DONE
    command = ["heal", str(run), "--tokens", "300", "--row-tokens", "32", "--batch-tokens", "64", "--out", str(out)]

    def interrupt(*_: Any) -> str:
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()} "):
            refuse_held(out)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("search.healing.training._Healing._step", interrupt)
        assert cli.main(command) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    beginning = "search.py: interrupted; continue with: python search.py "
    assert said.startswith(beginning)
    again = shlex.split(said.removeprefix(beginning))
    assert again == command
    assert cli.main(again) == cli.DONE
    assert "healing resumes from step 0" in capsys.readouterr().err


def test_a_second_healing_into_a_folder_is_refused_and_told_who_holds_it_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, exported = tmp_path / "run", tmp_path / "exported"
    run.mkdir()
    exported.mkdir()
    (run / "config.json").write_text(Config.of({"model": "random:nothing"}).to_json())
    (exported / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "chisel"}}')
    for folder in (run, exported):
        (folder / "prior.json").write_text(json.dumps(document()))
    for command, folder in (
        ([run], run / "healed-text-30min"),
        ([run, "--out", tmp_path / "out"], tmp_path / "out"),
        ([exported, "--model", "random:nothing"], tmp_path / ".exported-healed-text-30min-unfinished"),
    ):
        with RunFolder(folder):
            assert cli.main(["heal", *map(str, command), "--quiet"]) == cli.REFUSED
        assert f"{folder} is in use by process {os.getpid()} on " in capsys.readouterr().err


def test_of_processes_that_heal_together_only_the_first_takes_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with held(tmp_path):
        with pytest.raises(ValueError, match="in use by"):
            held(tmp_path)
        monkeypatch.setenv("RANK", "1")
        with held(tmp_path):
            pass


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_an_exported_folder_is_healed_into_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, exported, out = (tmp_path / name for name in ("run", "exported", "exported and healed"))
    assert cli.main(words(out=run, budget=0, agent="lagrangian", target_kept=0.4)) == cli.DONE
    form = ["--state", "searched", "--dtype", "float32", "--quiet"]
    assert cli.main(["export", str(run), "--out", str(exported), *form]) == cli.DONE
    training = ["--data", "sampled", "--tokens", "6000", "--row-tokens", "32", "--batch-tokens", "256"]
    command = ["heal", str(exported), "--out", str(out), *training, "--rate", "1e-4", "--quiet"]
    capsys.readouterr()
    assert cli.main([*command, "--model", "random:tiny-gpt2"]) == cli.REFUSED
    assert "pass the former with --model" in capsys.readouterr().err
    whole = [*command, "--model", "random:tiny-llama"]
    assert cli.main(whole) == cli.DONE
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    kl = {row[0]: float(row[1]) for row in rows if row[0] in ("exported", "healed")}
    assert kl["healed"] < kl["exported"]
    before, after = (load_for_use(str(folder), "cpu").model for folder in (exported, out))
    assert describe(before) == describe(after)
    assert "trained" in (out / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()
    assert cli.main(whole) == cli.REFUSED  # the folder is there now


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_repaired_weights_that_lack_something_are_said_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    assert cli.main(words(out=run, budget=0, agent="lagrangian", repair_tokens=512)) == cli.DONE
    command = ["heal", str(run), "--tokens", "128", "--row-tokens", "32", "--batch-tokens", "64", "--out", str(out)]

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(healing_run, "heal_", interrupted)
        assert cli.main(command) == INTERRUPTED
    [folder] = out.glob("unfinished-*/start")
    repaired = Checkpoints(folder).newest(lambda found: found)
    assert repaired is not None
    left = dict(repaired.tensors)
    lost = left.popitem()[0]
    Checkpoints(folder).save(replace(repaired, tensors=left))
    capsys.readouterr()
    assert cli.main(command) == cli.DONE
    said = capsys.readouterr().err
    assert re.search(rf"checkpoint step-00000000\.json cannot be used \(.*{lost.rpartition('.')[2]}", said)
    assert (out / "healing.json").is_file()


def test_layers_are_not_made_without_the_bias_that_their_site_has() -> None:
    model = load_model("random:tiny-gpt2", "cpu").model
    sites = discover_sites(model)
    dense, tensors = Schedule.dense(tuple(site.name for site in sites)), site_tensors(model, sites)
    with pytest.raises(ValueError, match=f"do not fit {sites[0].name}: only one of the two has a bias"):
        load_sites_(model, sites, dense, {name: each for name, each in tensors.items() if not name.endswith("bias")})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "does not exist"),
        (["--minutes", "-1"], "minutes must be above 0 and at most 100,000, got -1"),
        (["--loss", "love"], "invalid choice"),
    ],
)
def test_what_cannot_be_healed_is_refused(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["heal", str(tmp_path), *flags]) == cli.REFUSED
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_sharing_copy_has_the_same_tensors_and_other_modules() -> None:
    model = load_model("random:tiny-llama", "cpu").model
    other = sharing_copy(model)
    assert all(one is two for one, two in zip(model.parameters(), other.parameters(), strict=True))
    assert not set(map(id, model.modules())) & set(map(id, other.modules()))


@pytest.mark.parametrize(
    ("after", "before", "worse"),
    [
        ((2.0, 4.0, 3.1), (1.0, 3.0, 2.0), True),  # each sequence by about one
        ((1.0, 3.0, 2.0), (2.0, 4.0, 3.1), False),
        ((1.0, 3.0, 2.0), (1.0, 3.0, 2.0), False),
        ((5.0, 1.0, 2.1), (1.0, 4.0, 2.0), False),  # more on the whole, but one of three only
        (None, (1.0, 3.0, 2.0), True),
        ((1.0, 3.0, 2.0), None, False),
        (None, None, False),
    ],
)
def test_a_repair_is_worse_when_it_is_so_beyond_a_standard_error(
    after: tuple[float, ...] | None, before: tuple[float, ...] | None, worse: bool
) -> None:
    def quality(kl: tuple[float, ...] | None) -> Quality:
        return Quality() if kl is None else Quality(state="ok", kl_by_sequence=kl, tokens_by_sequence=(1, 1, 1))

    assert repair_did_harm(quality(after), quality(before)) is worse


def test_a_gpu_takes_larger_steps_unless_told_otherwise() -> None:
    small, large = (HealingOptions(minutes=1.0).plan(0, torch.device(name)) for name in ("cpu", "cuda"))
    assert large.batch_tokens > small.batch_tokens
    assert HealingOptions(minutes=1.0, batch_tokens=64, rate=0.5).plan(3, torch.device("cuda")) == replace(
        large, batch_tokens=64, rate=0.5, seed=3
    )
