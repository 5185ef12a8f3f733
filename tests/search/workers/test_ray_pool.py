"""Evaluators in processes of their own: equal to the one in this process, and what becomes of those that die or hang.

One Ray for all tests here, since starting it takes seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from fake_data import data_for_processes, jsonl
from scripted_worker import Scripted

from benchmarks.chaos import journal
from compression import Choice, Schedule
from compression.size import Size
from envs import Problem
from search import cli
from search.config import Config
from search.evaluation.pool import Job, Pool, Result, SerialPool
from search.evaluation.quality import Quality
from search.evaluation.score import Score
from search.experiment.experiment import Experiment
from search.experiment.open_model import open_model
from search.model.loading import load_model
from search.profiling.sensitivity import parse_rows
from search.runtime.errors import EvaluatorsLost
from search.workers.pools import check_evaluators, search_pool
from search.workers.remote_evaluator import portable_fields

pytestmark = pytest.mark.slow
VALUES: dict[str, object] = {
    "model": "random:tiny-llama",
    "device": "cpu",
    "target_kept": 0.7,
    "calibration_tokens": 1500,
    "search_items": 2,
    "search_text_tokens": 128,
    "search_shards": 2,
    "heldout_tokens": 600,
    "report_items": 6,
    "threads": 1,
}


def score(kl: float, state: str = "ok", reason: str = "", seconds: float = 0.0) -> Score:
    size = Size(**{field.name: 1 for field in dataclasses.fields(Size)})
    return Score(state, Quality(state="ok", kl=kl), size, seconds, reason)


def failed(schedule: Schedule, reason: str, seconds: float) -> Score:
    return score(0, "failed", reason, seconds)


def job(chi: int, repeat: int = 0) -> Job:
    return Job(Schedule((("site", Choice("lowrank", chi, "plain")),)), repeat)


def drain(pool: Pool, count: int) -> dict[int, Result]:
    results = dict(pool.finished() for _ in range(count))
    assert len(results) == count
    return results


@pytest.fixture(scope="module")
def ray_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Ray on this machine, hand-made data packages for its workers, and an empty cache."""
    folder = tmp_path_factory.mktemp("päckchen mit leerzeichen")
    with pytest.MonkeyPatch.context() as patch:
        data_for_processes(folder, patch)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        from search.workers.ray_cluster import session_folder, start_here

        with session_folder() as private:
            start_here(private, num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            yield ray
            ray.shutdown()
        assert not private.exists()


@pytest.fixture
def scripted(ray_here: Any, tmp_path: Path) -> Iterator[Any]:
    """Makes pools of scripted workers, and closes them."""
    from search.workers.ray_pool import RayPool

    pools: list[RayPool] = []

    def make(count: int, *troubles: str, **how: Any) -> RayPool:
        """Of the workers one after the other, the last one's is that of all others."""
        actor = ray_here.remote(Scripted).options(num_cpus=0, max_restarts=0)
        coming = itertools.chain(troubles, itertools.repeat(troubles[-1] if troubles else ""))
        start = lambda: actor.remote(str(tmp_path), score(0).to_dict(), next(coming))  # noqa: E731
        pools.append(RayPool(start, count, failed, **how))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def test_several_evaluators_give_the_scores_and_slopes_of_the_one_in_this_process(ray_here: Any) -> None:
    config = Config.of({**VALUES, "evaluators": "2"})
    loaded, sites = open_model(config, torch.device("cpu"))
    experiment = Experiment.of(config, loaded, sites, torch.device("cpu"))
    problem = Problem.build(experiment.menu(), config.target_kept, config.granularity)
    middle = (problem.middle,) * problem.steps
    schedules = [problem.schedule((level, *middle[1:])) for level in range(problem.middle)]
    jobs = [Job(schedule, repeat) for schedule in schedules for repeat in range(2)]
    jobs.append(Job(schedules[0], 1, problem.probe(schedules[0])))
    with experiment.evaluator("search", problem.closed_form()) as evaluator:
        serial = SerialPool(evaluator, evaluator.dense)
        for number, one in enumerate(jobs):
            serial.submit(number, one)
        expected = drain(serial, len(jobs))
        dense = evaluator.dense
    with search_pool(experiment, problem.closed_form(), lambda line: None) as pool:
        assert pool.capacity == 2
        assert figures(pool.dense) == figures(dense)
        for number, one in reversed(list(enumerate(jobs))):
            pool.submit(number, one)
        found = drain(pool, len(jobs))
    assert found.keys() == expected.keys()
    for number, result in expected.items():
        assert figures(found[number].score) == figures(result.score)
        assert found[number].slopes == result.slopes
    assert expected[len(jobs) - 1].slopes


def test_a_sweep_is_the_same_however_many_evaluators_share_it(ray_here: Any, tmp_path: Path) -> None:
    sizes = {name: value for name, value in VALUES.items() if name != "target_kept"}
    flags = [word for name, value in sizes.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = ["profile", *flags, "--context", "100", "--chi", "2,6", "--fractions", "none", "--quiet"]
    assert cli.main([*command, "--out", str(tmp_path / "one")]) == cli.DONE
    assert cli.main([*command, "--out", str(tmp_path / "two"), "--evaluators", "2"]) == cli.DONE
    one, two = (
        [dataclasses.replace(row, seconds=0.0) for row in parse_rows((tmp_path / name / "sensitivity.csv").read_text())]
        for name in ("one", "two")
    )
    assert len(one) > 6
    assert one == two


def test_evaluators_in_another_folder_find_the_model_and_the_questions_of_a_relative_path(
    ray_here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load_model("random:tiny-llama", "cpu")
    loaded.model.save_pretrained("my model")
    loaded.tokenizer.save_pretrained("my model")
    choices = ["one", "two", "three"]
    jsonl(Path("exam.jsonl"), [{"question": f"What is {n}?", "choices": choices, "answer": n % 3} for n in range(40)])
    values = {**VALUES, "model": "my model", "proxy": "exam.jsonl", "out": "läuft", "trial_timeout": 300.0}
    values |= {"budget": 3, "agent": "random", "repair_tokens": 0, "heal_minutes": 0}
    values |= {"benchmark_items": 0, "export": "none"}
    flags = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert ray_here.get(ray_here.remote(lambda: os.getcwd()).remote()) != str(tmp_path)
    assert cli.main([*flags, "--quiet"]) == cli.DONE
    assert len(journal(tmp_path / "läuft" / "study.db")) == 3


def test_nothing_travels_to_an_evaluator_but_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prior.json").touch()
    Path("model").mkdir()
    values = portable_fields(Config.of({**VALUES, "model": "model", "prior": "prior.json", "out": "out"}))
    assert not {"prior", "policy", "out", "resume"} & values.keys()
    assert values["model"] == str(tmp_path / "model")
    Path("prior.json").unlink()
    assert Config.of(values).model == values["model"]


def figures(of: Score) -> dict[str, Any]:
    return {name: value for name, value in of.to_dict().items() if name != "seconds"}


def test_results_carry_the_number_of_their_job_in_whatever_order_they_come(scripted: Any) -> None:
    pool = scripted(2)
    for number in range(30):
        pool.submit(number, job(10 + number, number % 2))
    results = drain(pool, 30)
    assert all(result.score.kl == 10 + number + number % 2 / 10 for number, result in results.items())
    with pytest.raises(IndexError):
        pool.finished()


def test_a_job_whose_worker_is_killed_runs_again_and_counts_once(scripted: Any, tmp_path: Path) -> None:
    notes: list[str] = []
    pool = scripted(1, note=notes.append)
    for number, chi in enumerate((5, 2, 6)):
        pool.submit(number, job(chi))
    results = drain(pool, 3)
    assert [results[number].score.kl for number in range(3)] == [5, 2, 6]
    assert sorted(path.name for path in tmp_path.glob("[256].*"))[:4] == ["2.0", "2.1", "5.0", "6.0"]
    assert len(notes) == 1


def test_a_schedule_that_kills_every_worker_fails_after_two_and_takes_no_other_with_it(
    scripted: Any, tmp_path: Path
) -> None:
    pool = scripted(2)
    chis = [*range(10, 20), 1, *range(20, 30)]
    for number, chi in enumerate(chis):
        pool.submit(number, job(chi))
    results = drain(pool, len(chis))
    assert results[10].score.state == "failed"
    assert "2 evaluators died of it" in results[10].score.reason
    assert all(results[number].score.kl == chi for number, chi in enumerate(chis) if chi != 1)
    assert len(list(tmp_path.glob("1.*"))) <= 3  # in company once, then alone twice


def test_an_evaluator_that_hangs_is_replaced_and_its_trial_failed(scripted: Any) -> None:
    pool = scripted(1, timeout=1.0)
    pool.submit(0, job(3))
    pool.submit(1, job(5))
    start = time.monotonic()
    results = drain(pool, 2)
    assert time.monotonic() - start < 60
    assert results[0].score.state == "failed"
    assert results[0].score.reason == "took longer than --trial-timeout 1 seconds"
    assert results[1].score.kl == 5


def test_a_schedule_that_hangs_among_several_jobs_takes_no_other_with_it(scripted: Any, tmp_path: Path) -> None:
    pool = scripted(1, timeout=1.0)
    chis = [10, 11, 3, 12]
    for number, chi in enumerate(chis):
        pool.submit(number, job(chi))
    results = drain(pool, len(chis))
    assert results[2].score.reason == "took longer than --trial-timeout 1 seconds"
    assert [results[number].score.kl for number in (0, 1, 3)] == [10, 11, 12]
    assert len(list(tmp_path.glob("3.*"))) == 2  # in company, then alone
    assert len(list(tmp_path.glob("11.*"))) == 2


def test_workers_that_cannot_start_end_the_search(scripted: Any) -> None:
    with pytest.raises(EvaluatorsLost, match="3 evaluators in a row died as they started"):
        scripted(1, "dies")
    with pytest.raises(ValueError, match="target_kept must be something else"):
        scripted(1, "refuses")
    with pytest.raises(ValueError, match="must have the same model, data"):
        pool = scripted(2, "differs")
        for number in range(50):
            pool.submit(number, job(5 + number))
            pool.finished()
            time.sleep(0.2)


def test_workers_that_cannot_start_for_a_while_do_not_end_a_search_that_was_under_way(
    scripted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("search.workers.ray_pool._PAUSE", 0.0)
    pool = scripted(1, "", "dies", "dies", "dies", "dies", "")
    pool.submit(0, job(2))
    assert drain(pool, 1)[0].score.kl == 2


@pytest.mark.usefixtures("ray_here")
def test_the_session_folder_and_its_sockets_are_private_to_the_user(ray_here: Any) -> None:
    session = Path(ray_here._private.worker._global_node.get_session_dir_path())
    private = session.parent.parent
    assert private.name.startswith(".chisel.ray.")
    assert [path for path in (session / "sockets").iterdir() if path.is_socket()]
    assert stat.S_IMODE(private.stat().st_mode) == 0o700  # nobody else reaches what is inside, whatever modes Ray sets


def test_a_long_name_of_the_temporary_folder_leaves_room_for_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    from search.workers.ray_cluster import session_folder

    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "long/" * 20)
    with session_folder() as folder:
        assert folder.parent == Path("/tmp")
    assert not folder.exists()


def test_nothing_listens_beyond_loopback() -> None:
    listening = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # workers come and go
            found = process.net_connections("inet")
            listening += [at.laddr.ip for at in found if at.status == psutil.CONN_LISTEN]
    assert listening
    assert {address.removeprefix("::ffff:") for address in listening} <= {"127.0.0.1", "::1"}


def test_a_missing_ray_is_named_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_evaluators(Config())
    for flag, value in (("evaluators", "2"), ("ray_address", "auto"), ("trial_timeout", 3.0)):
        with pytest.raises(ValueError, match=rf"--{flag.replace('_', '-')} needs ray.*chisel-prior\[cluster\]"):
            check_evaluators(Config.of({flag: value}))


def test_a_job_and_a_result_survive_their_journey() -> None:
    there = Job(job(4).schedule, 2, job(9).schedule)
    assert Job.from_json(there.to_json()) == there
    back = Result(score(1.25), {"site": float("nan")})
    again = Result.from_json(back.to_json())
    assert figures(again.score) == figures(back.score)
    assert json.dumps(again.slopes) == json.dumps(back.slopes)
