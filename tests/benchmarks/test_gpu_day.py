"""The pieces of a GPU's day: what was interrupted goes on, what has ended or failed does not run again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import gpu_day
from benchmarks.gpu_day import Day, Piece, pieces, same_scores, work


class _Script(Piece):
    """A piece that is a line of Python."""

    def command(self, out: Path) -> list[str]:
        return [sys.executable, "-c", self.words[0].replace("{out}", str(out))]


def test_a_call_stops_in_time_and_the_next_one_goes_on(tmp_path: Path) -> None:
    slow = "import pathlib, time; p = pathlib.Path('{out}/begun'); p.exists() or (p.touch(), time.sleep(60))"
    wanted = [_Script("quick", ("print('hello')",)), _Script("broken", ("1 / 0",)), _Script("slow", (slow,))]
    assert work(Day(tmp_path), wanted, 0.1) == {"quick": 0, "broken": 1, "slow": 130}
    assert [piece.name for piece in Day(tmp_path).left(wanted)] == ["slow"]
    assert work(Day(tmp_path), wanted, 0.5) == {"slow": 0}
    assert (tmp_path / "quick.log").read_text() == "hello\n"
    body, bars = Day(tmp_path).report(wanted)
    assert [line.split("|")[2].strip() for line in body.splitlines()[2:]] == ["done", "failed (1)", "done"]
    assert not bars


def test_a_job_that_has_a_folder_is_resumed(tmp_path: Path) -> None:
    first, *_ = pieces(tmp_path, 24.0)
    assert first.command(tmp_path)[1:] == ["search.py", *first.words, "--out", str(tmp_path / "job-1b")]
    (tmp_path / "job-1b").mkdir()
    (tmp_path / "job-1b" / "config.json").touch()
    assert first.command(tmp_path)[1:] == ["search.py", "--resume", str(tmp_path / "job-1b")]


def test_models_of_experiments_are_pieces_where_their_files_are(tmp_path: Path) -> None:
    assert not any("qwen" in piece.name for piece in pieces(tmp_path, 24.0))
    (tmp_path / "qwen2.5-coder-1.5b.gguf").touch()
    assert [piece.name for piece in pieces(tmp_path, 24.0) if "qwen" in piece.name] == ["job-qwen2.5-coder-1.5b"]


def test_jobs_are_told_by_stage_and_their_scores_compared(tmp_path: Path) -> None:
    wanted = [Piece("one-evaluator", ()), Piece("four-evaluators", ())]
    day = Day(tmp_path)
    for number, piece in enumerate(wanted):
        (tmp_path / piece.name).mkdir()
        (tmp_path / piece.name / "stages.csv").write_text(f"stage,seconds\nload,2.0\nsearch,{30 + number}.0\n")
        lines = [f"a,0,{0.5 + 0.25 * number}", f"b,0,{0.5}", f"only{number},0,9"]
        (tmp_path / piece.name / "trials.csv").write_text("\n".join(["digest,shard,kl", *lines]) + "\n")
        day.state[piece.name] = {"code": 0, "seconds": 60.0, "sessions": 1, "memory": 100}
    body, _ = day.report(wanted)
    assert "| search | 30 | 31 |" in body
    assert "| four-evaluators | 2 | 0.25 |" in body
    assert same_scores(tmp_path, ["one-evaluator"]) == ""


def test_without_a_gpu_nothing_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_day.torch.cuda, "is_available", lambda: False)
    for words, wanted in ([], "no GPU here"), (["--only", "nothing"], "no piece nothing"):
        monkeypatch.setattr(sys, "argv", ["gpu_day", "--out", str(tmp_path / "day"), *words])
        with pytest.raises(SystemExit):
            gpu_day.main()
        assert wanted in capsys.readouterr().err
    assert not (tmp_path / "day").exists()
