"""From a run folder to an exported one, on the real pipeline with a tiny model."""

import json

import pytest
import torch
from fake_data import fake_data  # noqa: F401 (a fixture)
from tiny_model import assert_same_logits

from search import cli
from search.experiment.experiment import Experiment
from search.export.restore import restore
from search.healing import repaired_start
from search.model.loading import load_for_use
from search.runtime.console import Console

FLAGS = (
    "--model random:tiny-llama --budget 1 --target-kept 0.7 --calibration-tokens 1500 --repair-tokens 600 "
    "--heal-minutes 0 --benchmark-items 0 --export none"
)
SIZES = "--search-items 4 --search-shards 1 --search-text-tokens 64 --heldout-tokens 128 --report-items 6 --device cpu"


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_a_run_is_exported_as_it_was_measured_in_every_form(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    assert cli.main([*FLAGS.split(), *SIZES.split(), "--quiet", "--out", str(run)]) == cli.DONE
    rows = {row["schedule"]: row for row in json.loads((run / "summary.json").read_text())["rows"]}
    # The repaired weights are kept: nothing is repaired again.
    monkeypatch.setattr(Experiment, "repair_", lambda *_, **__: pytest.fail("it was repaired again"))
    outcome = restore(run, Console(quiet=True), "cpu", reference=True)
    assert outcome.state == "repaired"
    measured = outcome.workload.measure(outcome.experiment.loaded.model)
    assert measured.kl == pytest.approx(rows["repaired"]["kl"], rel=1e-3)

    command = ["export", str(run), "--quiet", "--device", "cpu", "--dtype", "float32"]
    capsys.readouterr()
    assert cli.main(command) == cli.DONE
    assert "less) and" in capsys.readouterr().out
    read = load_for_use(str(run / "hf"), "cpu")
    assert read.license == "none"
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        expected = outcome.experiment.loaded.model.float()(ids).logits
        assert_same_logits(read.model(ids).logits, expected)
    assert "| repaired |" in (run / "hf" / "README.md").read_text()
    assert (run / "hf" / "prior.json").read_bytes() == (run / "prior.json").read_bytes()

    assert cli.main([*command, "--format", "dense", "--out", str(tmp_path / "dense")]) == cli.DONE
    assert "the size of the original" in capsys.readouterr().out
    with torch.no_grad():
        dense = load_for_use(str(tmp_path / "dense"), "cpu").model(ids).logits
    torch.testing.assert_close(dense, expected, rtol=1e-3, atol=1e-3)

    assert cli.main([*command, "--quantize", "int4", "--out", str(tmp_path / "int4")]) == cli.DONE
    card = (tmp_path / "int4" / "README.md").read_text()
    assert "| repaired, int4 |" in card
    small, whole = (sum(f.stat().st_size for f in d.glob("*.safetensors")) for d in (tmp_path / "int4", run / "hf"))
    assert small < whole / 2
    load_for_use(str(tmp_path / "int4"), "cpu")

    assert cli.main(command) == cli.REFUSED  # the folder is there already


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_repaired_weights_that_are_damaged_or_of_other_settings_are_made_again(tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert cli.main([*FLAGS.split(), *SIZES.split(), "--quiet", "--out", str(run)]) == cli.DONE
    repairs, repair = [], Experiment.repair_
    monkeypatch.setattr(Experiment, "repair_", lambda *given, **how: repairs.append(1) or repair(*given, **how))
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        kept = restore(run, Console(quiet=True), "cpu").experiment.loaded.model(ids).logits
    assert repairs == []
    weights = run / "repaired" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    again = restore(run, Console(quiet=True), "cpu").experiment.loaded.model
    assert repairs == [1]
    with torch.no_grad():
        assert_same_logits(kept, again(ids).logits)


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_a_repair_that_was_left_out_is_had_on_demand_and_a_healing_is_not(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(repaired_start, "repair_did_harm", lambda after, before: True)
    run = tmp_path / "run"
    assert cli.main([*FLAGS.split(), *SIZES.split(), "--quiet", "--out", str(run)]) == cli.DONE
    rows = [row["schedule"] for row in json.loads((run / "summary.json").read_text())["rows"]]
    assert (rows[-1], rows.count("repaired")) == ("searched", 0)
    command = ["export", str(run), "--quiet", "--device", "cpu"]
    for words, said in (([], "Nothing was trained or repaired"), (["--state", "repaired"], "solved anew")):
        out = tmp_path / said
        assert cli.main([*command, *words, "--out", str(out)]) == cli.DONE
        assert said in (out / "README.md").read_text()
    capsys.readouterr()
    assert cli.main([*command, "--state", "healed", "--out", str(tmp_path / "none")]) == cli.REFUSED
    assert "was not healed" in capsys.readouterr().err
