"""The example scripts run as they stand, with small numbers."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nbclient
import nbformat
import pytest
from fake_data import data_for_processes, fake_data

import agents
from agents import AgentContext
from envs import Problem, Reward, ToyEvaluator, toy_menu
from examples import new_proxy, new_topology, python_api, train_ppo
from search import cli
from search.data.datasets import load_proxy

__all__ = ["fake_data"]

ROOT = Path(__file__).parents[2]
CLIMB = "examples.new_agent:HillClimb"


@pytest.mark.parametrize("more", [[], ["--slopes"]])
def test_an_off_the_shelf_agent_trains_and_a_second_run_measures_nothing(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--episodes", "120", "--blocks", "3", "--table", str(tmp_path / "scores.json"), *more]
    train_ppo.main(words)
    first = capsys.readouterr().out
    assert "closed form KL" in first
    measured = int(first.splitlines()[-1].split()[0])
    assert measured > 10
    train_ppo.main(words)
    second = capsys.readouterr().out
    assert second.splitlines() == [first.splitlines()[0], first.splitlines()[1].replace(f"{measured}", "0", 1)]


def test_a_file_that_is_no_table_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "scores.json").write_text("no")
    with pytest.raises(ValueError, match="not a table of scores"):
        train_ppo.main(["--table", str(tmp_path / "scores.json")])


def test_an_agent_of_ones_own_climbs() -> None:
    problem, reward = Problem.build(toy_menu(8), 0.5), Reward()
    agent, evaluate, rewards = agents.make(CLIMB, problem, AgentContext(0, 80)), ToyEvaluator(problem.menu), []
    while proposals := agent.ask(3):
        rewards += [reward(score) for score in evaluate([proposal.schedule for proposal in proposals])]
        agent.tell(proposals, rewards[-len(proposals) :])
    assert 40 < len(rewards) <= 80
    assert max(rewards) > rewards[0] + 0.005
    [best] = agent.recommend(1)
    assert reward(evaluate([best.schedule])[0]) == max(rewards)


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_it_is_named_on_the_command_line_and_resumed(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    words = ["--quick", "--model", "random:tiny-llama", "--device", "cpu", "--quiet", "--repair-tokens", "0"]
    words += ["--heal-minutes", "0", "--benchmark-items", "0", "--export", "none"]
    assert cli.main([*words, "--agent", CLIMB, "--budget", "4", "--out", out]) == cli.DONE
    assert json.loads((tmp_path / "run" / "config.json").read_text())["agent"] == CLIMB
    assert cli.main(["--resume", out, "--budget", "6", "--quiet"]) == cli.DONE
    assert len((tmp_path / "run" / "trials.csv").read_text().splitlines()) == 7


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere.at_all:Agent", "agent nowhere.at_all:Agent cannot be imported: there is no module nowhere"),
        ("examples.new_agent:Climb", "cannot be imported: examples.new_agent has no Climb"),
    ],
)
def test_one_that_is_not_there_is_refused_at_once(
    name: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["--agent", name, "--out", str(tmp_path / "run")]) == cli.REFUSED
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_table_of_questions_becomes_a_proxy(tmp_path: Path) -> None:
    rows = [
        {"question": f"What is {n} + {n}?", "right": f"{2 * n}", "wrong_1": f"{2 * n + 1}", "wrong_2": "ä"}
        for n in range(30)
    ]
    with (tmp_path / "exam.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    new_proxy.main([str(tmp_path / "exam.csv"), str(tmp_path / "exam.jsonl")])
    items = load_proxy(str(tmp_path / "exam.jsonl"))
    assert [item.choices[item.answer] for item in items] == [row["right"] for row in rows]
    assert {item.answer for item in items} == {0, 1, 2}


@pytest.mark.usefixtures("fake_data")
def test_a_topology_is_a_name_and_costs_what_its_fit_leaves(capsys: pytest.CaptureFixture[str]) -> None:
    few, _ = new_topology.main(["--chi", "4"])
    more, lowrank = new_topology.main([])
    assert 0 < more < few
    assert lowrank > 0
    assert "low rank χ" in capsys.readouterr().out


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_the_whole_job_runs_from_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = python_api.main("random:tiny-llama", tmp_path / "out", minutes=0.02)
    assert (folder / "config.json").is_file()
    said = capsys.readouterr().out
    assert "healed: KL" in said


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_for_processes(tmp_path, monkeypatch)
    notebook = nbformat.read(ROOT / "examples" / "finished_run.ipynb", as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": ROOT}}
    ).execute()
    drawn = [out for cell in notebook.cells for out in cell.get("outputs", ()) if "image/png" in out.get("data", {})]
    assert len(drawn) == 5
    assert "dense" in str(notebook.cells[5]["outputs"])
