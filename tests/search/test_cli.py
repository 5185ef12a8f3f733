import errno
import io
import json
import os
import subprocess
import sys
import types
from importlib import import_module
from pathlib import Path

import pytest

from compression.refusal import Refusal
from search import cli
from search.commands.exits import FAULT
from search.config import AGENTS, PLANNERS, RECORDED, Config
from search.runtime.errors import DataUnavailable
from search.runtime.run_folder import CONFIG

ROOT = Path(__file__).parents[2]
ROWS = [{"schedule": "dense", "kept_fraction": 1.0, "kl": 0.0, "items": 32, "bytes": 12}]


@pytest.fixture
def pipeline(monkeypatch, tmp_path):
    """A pipeline that notes the configuration it gets and does what `fake.act` says."""
    fake = types.SimpleNamespace(configs=[], act=lambda config, console: None, failures=0)

    def run(config, console):
        fake.configs.append(config)
        fake.act(config, console)
        return types.SimpleNamespace(
            folder=tmp_path, rows=ROWS, failures=fake.failures, document={"rows": ROWS}, experiment=None, fault=None
        )

    def plan(config):
        fake.configs.append(config)
        return {"agent": config.agent, "sites": {"count": 210, "families": ["q", "k"]}}

    stand_ins = {
        "search.pipeline.run": {"run": run},
        "search.pipeline.dry_run": {"plan": plan},
        "search.pipeline.finish": {"finish": lambda folder, experiment, console: []},
        "search.data.packages": {"fetch": lambda: tmp_path / "cache"},
    }
    for name, functions in stand_ins.items():
        module = types.ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
        package, _, short = name.rpartition(".")
        monkeypatch.setattr(import_module(package), short, module, raising=False)
    monkeypatch.delenv("CHISEL_TRACEBACK", raising=False)
    return fake


def refused(words, capsys):
    """Exit code and the one line of a command that must not have started."""
    code = cli.main(words)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return code, err.removeprefix("search.py: ").rstrip("\n")


def test_no_arguments_is_the_default_search(pipeline, capsys):
    assert cli.main([]) == cli.DONE
    assert pipeline.configs == [Config()]
    assert "dense" in capsys.readouterr().out


def test_every_field_has_a_flag_of_its_name(pipeline, capsys):
    texts = dict(
        agent="random", granularity="family", out="o", model="m", proxy="sciq", proxy_form="letter", device="cpu"
    )
    texts |= dict(optimize="latency", export="hf", dtype="bfloat16", form="plain", attention="eager", experts="fused")
    texts |= dict(serve="transformers")
    sizes = dict(calibration_tokens=600, search_items=3, search_text_tokens=100, search_shards=2)
    sizes |= dict(heldout_tokens=101, report_items=4, repair_tokens=512, heal_minutes=0.5, benchmark_items=5)
    weights = dict(kl_weight=2.0, correct_weight=0.0, compression_weight=0.5, bytes_weight=0.1, latency_weight=0.2)
    sizes |= dict(reward_repair_tokens=256, width_multiple=8, shrinkage=0.1, embedding_bits=16, matrix_bits="16")
    where = dict(evaluators="4", gpus_per_evaluator=0.5, ray_address="head:6379", trial_timeout=9.5)
    values = {**texts, **sizes, **weights, **where, "budget": 7, "target_kept": 0.5, "seed": 9, "threads": 2}
    flags = {"quick", "per_head", "trust_remote_code", "calibration_for_search", "split_fused"}
    others = {"calibration", "device_map", "policy", "prior", "resume", "size", "target_bytes_kept", *RECORDED}
    assert set(values) | flags | others == set(Config.model_fields)
    words = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert cli.main(["search", *words, "--quick", "--per-head"]) == cli.DONE
    assert pipeline.configs == [Config.of({**values, "quick": True, "per_head": True})]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--agent", "reinforc"],
            f"--agent must be one of {', '.join(AGENTS)}, or module:Class of your own, got 'reinforc'",
        ),
        (["--budget", "-1"], "--budget must be a whole number from 0 to 10000000, got -1"),
        (["--benchmark-items", "1"], "--benchmark-items must be 0, or a whole number from 2 to 100000, got 1"),
        (["--budget", "ten"], "--budget must be a whole number from 0 to 10000000, got 'ten'"),
        (["--budget", "1.5"], "--budget must be a whole number from 0 to 10000000, got '1.5'"),
        (["--target-kept", "0"], "--target-kept must be a number above 0 and at most 1, got 0.0"),
        (["--target-kept", "nan"], "--target-kept must be a number above 0 and at most 1, got nan"),
        (["--target-kept", "1.2"], "--target-kept must be a number above 0 and at most 1, got 1.2"),
        (["--proxy", "mmul"], "the nearest is mmlu"),
        (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--buget", "3"], "unknown argument '--buget'; the nearest is --budget"),
        (["--budg", "3"], "unknown argument '--budg'; the nearest is --budget"),
        (["--budget"], "argument --budget: expected one argument"),
        (["serch"], "unknown command 'serch'; the nearest is search"),
        (["--resume", "nowhere"], "--resume must be the folder of an earlier run"),
        (["--config", "nowhere.json"], "cannot read the configuration nowhere.json"),
        (["benchmark", "x", "--threads", "0"], "threads must be a whole number from 1 to 1024, got '0'"),
        (["benchmark", "x", "--samples", "1" * 5000], "samples must be a whole number from 2 to 1000000000, got '111"),
        (["profile", "--tokens", ""], "tokens must be a whole number from 64 to 1000000000, got ''"),
        (["profile", "--context", "64,65"], "context must be a whole number from 64 to 1000000000, got '64,65'"),
        (["generate", "x", "--seed", "1" * 30], "seed must be a whole number from 0 to 4294967295, got 111"),
        (["generate", "x", "--temperature", "1e-300"], "temperature must be 0 or from 0.01 to 100, got 1e-300"),
        (["data", "--quite"], "unknown argument '--quite'; the nearest is --quiet"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_before_any_work(pipeline, capsys, words, message):
    code, line = refused(words, capsys)
    assert code == cli.REFUSED
    assert message in line
    assert pipeline.configs == []


def failing(pipeline, error, folder=None):
    def act(config, console):
        if folder is not None:
            console.opened(folder)
        raise error

    pipeline.act = act


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (Refusal("target_kept must be\nat least 0.1"), cli.REFUSED, "--target-kept must be at least 0.1"),
        (DataUnavailable("no network; set CHISEL_DATA"), cli.REFUSED, "no network; set CHISEL_DATA"),
        (OSError(errno.ENOSPC, "No space left on device"), cli.FAILURES, "No space left on device"),
        (MemoryError(), cli.FAILURES, "out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_each_kind_of_failure_has_its_line_and_code(pipeline, capsys, error, code, words):
    failing(pipeline, error)
    found, line = refused(["--quiet"], capsys)
    assert found == code
    assert words in line


@pytest.mark.parametrize("error", [KeyError("oops"), ValueError("oops"), OSError("oops")])
def test_a_fault_of_ours_is_called_one_and_its_traceback_is_kept(pipeline, capsys, tmp_path, error):
    # A ValueError that is no Refusal is not the user's mistake.
    failing(pipeline, error, tmp_path)
    found, line = refused(["--quiet"], capsys)
    assert found == FAULT
    assert "fault of Chisel" in line
    assert "oops" in line
    assert str(tmp_path / "run.log") in line
    log = (tmp_path / "run.log").read_text()
    assert "Traceback" in log
    assert type(error).__name__ in log


def test_a_fault_before_there_is_a_folder_shows_its_traceback(pipeline, capsys):
    failing(pipeline, KeyError("oops"))
    assert cli.main(["--quiet"]) == FAULT
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert "fault of Chisel" in shown.splitlines()[-1]


def test_the_traceback_of_a_refusal_can_be_had(pipeline, monkeypatch):
    monkeypatch.setenv("CHISEL_TRACEBACK", "1")
    failing(pipeline, Refusal("why"))
    with pytest.raises(ValueError, match="why"):
        cli.main(["--quiet"])


def test_an_interrupted_run_tells_how_to_resume(pipeline, capsys):
    failing(pipeline, KeyboardInterrupt(), Path("results/my run"))
    _, line = refused(["--quiet"], capsys)
    assert line.endswith("continue with: python search.py --resume 'results/my run'")


def test_failed_trials_are_told_and_exit_4(pipeline, capsys):
    pipeline.failures = 2
    assert cli.main(["--quiet"]) == cli.FAILURES
    captured = capsys.readouterr()
    assert "dense" in captured.out
    assert "2 failed" in captured.err


def test_a_run_is_finished_whatever_its_output_can_hold(pipeline, monkeypatch):
    # The table is printed before benchmarks and export.
    full = io.StringIO()
    monkeypatch.setattr(full, "write", lambda text: os.write(-1, text.encode()))
    for stream in (io.TextIOWrapper(io.BytesIO(), encoding="ascii"), full):
        finished = []
        monkeypatch.setattr("search.pipeline.finish.finish", lambda *a, done=finished: done.append(a) or ["χ ± 鐵"])
        monkeypatch.setattr(sys, "stdout", stream)
        cli.main(["--quiet"])
        assert len(finished) == 1


def test_json_is_the_only_thing_on_standard_output(pipeline, capsys):
    pipeline.act = lambda config, console: console.note("working")
    assert cli.main(["--json"]) == cli.DONE
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"rows": ROWS}
    assert captured.err == "working\n"


def test_quiet_leaves_the_result_only(pipeline, capsys):
    pipeline.act = lambda config, console: console.note("working")
    assert cli.main(["--quiet"]) == cli.DONE
    captured = capsys.readouterr()
    assert "dense" in captured.out
    assert captured.err == ""


def test_a_dry_run_plans_and_does_not_run(pipeline, capsys):
    pipeline.act = lambda config, console: pytest.fail("it ran")
    assert cli.main(["--dry-run", "--agent", "random"]) == cli.DONE
    assert capsys.readouterr().out == "agent  random\nsites\n  count     210\n  families  q, k\n"
    assert cli.main(["--dry-run", "--json"]) == cli.DONE
    assert json.loads(capsys.readouterr().out)["sites"]["count"] == 210


def test_flags_win_over_the_configuration_file(pipeline, tmp_path):
    file = tmp_path / "my config.json"
    file.write_text('{"budget": 5, "seed": 4}', encoding="utf-8")
    assert cli.main(["--config", str(file), "--seed", "8", "--quiet"]) == cli.DONE
    assert pipeline.configs == [Config.of({"budget": 5, "seed": 8})]


def test_an_unknown_field_in_a_file_is_refused(pipeline, tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text('{"buget": 5}', encoding="utf-8")
    code, line = refused(["--config", str(file)], capsys)
    assert (code, line) == (2, "buget is not a field of the configuration; the nearest is budget")


@pytest.mark.parametrize("words", [["--resume"], ["resume"], ["resume", "--quiet"]])
def test_resume_takes_the_configuration_of_the_run(words, pipeline, tmp_path):
    (tmp_path / CONFIG).write_text(Config.of({"seed": 5, "quick": True}).to_json(), encoding="utf-8")
    assert cli.main([*words, str(tmp_path), "--budget", "40", "--quiet"]) == cli.DONE
    assert pipeline.configs == [Config.of({"seed": 5, "quick": True, "budget": 40, "resume": str(tmp_path)})]


@pytest.mark.parametrize("agent", PLANNERS)
def test_a_search_that_plans_with_its_budget_does_not_get_another_one(agent, pipeline, tmp_path, capsys):
    (tmp_path / CONFIG).write_text(Config.of({"agent": agent, "budget": 7}).to_json(), encoding="utf-8")
    code, line = refused(["--resume", str(tmp_path), "--budget", "8"], capsys)
    assert code == 2
    assert line.startswith(f"a search by {agent} plans with its budget")
    assert f"(was 7, is 8); start a new search from its result: --prior {tmp_path}/prior.json" in line
    assert cli.main(["--resume", str(tmp_path), "--budget", "7", "--quiet"]) == cli.DONE


def test_resume_with_another_configuration_is_refused_with_a_diff(pipeline, tmp_path, capsys):
    (tmp_path / CONFIG).write_text(Config.of({"seed": 5}).to_json(), encoding="utf-8")
    code, line = refused(["--resume", str(tmp_path), "--seed", "6", "--target-kept", "0.7"], capsys)
    assert code == cli.REFUSED
    assert "target_kept was 0.8, is 0.7" in line
    assert "seed was 5, is 6" in line
    assert pipeline.configs == []


def test_data_fetches_and_says_where(pipeline, tmp_path, capsys):
    assert cli.main(["data"]) == cli.DONE
    assert capsys.readouterr().out.strip() == str(tmp_path / "cache")
    assert pipeline.configs == []


def test_help_names_every_flag_and_starts_without_a_model_library():
    code = (
        "import sys\nfrom search.cli import main\ncode = main(['--help'])\n"
        "heavy = {'torch', 'transformers', 'optuna', 'gymnasium', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (run.returncode, run.stderr) == (0, "")
    for name in Config.model_fields.keys() - set(RECORDED):
        assert f"--{name.replace('_', '-')}" in run.stdout
    assert "examples:" in run.stdout


def test_the_script_beside_the_package_is_the_same_command():
    run = subprocess.run(
        [sys.executable, str(ROOT / "search.py"), "--budget", "-1"], capture_output=True, text=True, timeout=60
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "search.py: --budget must be a whole number from 0 to 10000000, got -1\n"
