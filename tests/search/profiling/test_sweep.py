"""A sweep on a tiny model: every cell is what it says, a stop loses nothing, and the summary is that of the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from fake_data import fake_data

from compression import Site
from search import cli
from search.commands.profile import levels_text
from search.evaluation.evaluator import ModelEvaluator
from search.model.loading import load_model
from search.profiling.sensitivity import (
    Row,
    block_by_chi,
    block_by_family,
    parse_rows,
    rank_correlation,
    rows_text,
    summary,
    traces,
)
from search.profiling.sweep import Levels, read_profile

__all__ = ["fake_data"]

SMALL = {
    "model": "random:tiny-llama",
    "device": "cpu",
    "calibration_tokens": 1500,
    "search_items": 2,
    "search_shards": 2,
    "search_text_tokens": 128,
    "heldout_tokens": 600,
    "report_items": 6,
    "tokens": 200,
}


def words(**changes: object) -> list[str]:
    flags = {f"--{name.replace('_', '-')}": str(value) for name, value in {**SMALL, **changes}.items()}
    return ["profile", *(word for pair in flags.items() for word in pair), "--quiet"]


def table(folder: Path) -> list[Row]:
    return [replace(row, seconds=0.0) for row in parse_rows((folder / "sensitivity.csv").read_text())]


def row(block: int, chi: int, kl: float, family: str = "q", predicted: float | None = None) -> Row:
    return Row(
        site=f"blocks.{block}.{family}",
        block=block,
        family=family,
        topology="pivoted-lowrank",
        chi=chi,
        relative_chi=chi / 100,
        kept_fraction=0.5,
        predicted_kl=kl if predicted is None else predicted,
        kl=kl,
        kl_standard_error=0.0,
        expected_accuracy=0.25,
        perplexity=10.0,
        state="ok",
        seconds=1.0,
    )


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_a_sweep_measures_every_site_at_every_level_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    proposed = []
    evaluate = ModelEvaluator.evaluate

    def remember(self: ModelEvaluator, schedules: Any, **how: Any) -> Any:
        proposed.extend(schedules)
        return evaluate(self, schedules, **how)

    monkeypatch.setattr(ModelEvaluator, "evaluate", remember)
    assert cli.main(words(out=tmp_path / "run", chi="2,6", fractions="0.25")) == cli.DONE
    rows = table(tmp_path / "run")
    assert len({(one.site, one.chi) for one in rows}) == len(rows) == len(proposed)
    assert {one.block for one in rows} == {0, 1, 2}
    assert len({one.family for one in rows}) == 7
    for schedule in proposed:
        assert sum(not choice.is_dense for _, choice in schedule) == 1
    by_site: dict[str, list[Row]] = {}
    for one in rows:
        assert one.state == "ok"
        assert one.kl > -1e-6
        by_site.setdefault(one.site, []).append(one)
    for of in by_site.values():
        predicted = [one.predicted_kl for one in of]
        assert [one.chi for one in of] == sorted(one.chi for one in of)
        assert predicted == sorted(predicted, reverse=True)
    read = pq.read_table(tmp_path / "run" / "sensitivity.parquet").to_pylist()
    assert [entry["kl"] for entry in read] == [one.kl for one in rows]
    for name in ("block-family", "block-chi"):
        assert (tmp_path / "run" / "plots" / f"{name}.svg").read_text().startswith("<?xml")
    assert (tmp_path / "run" / "summary.txt").read_text() in capsys.readouterr().out


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_a_stopped_sweep_goes_on_where_it_was_and_takes_more_levels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(out=tmp_path / "whole", chi="2,6", fractions="none")) == cli.DONE
    evaluate, calls = ModelEvaluator.evaluate, []

    def stop_at_the_tenth(self: ModelEvaluator, schedules: Any, **how: Any) -> Any:
        calls.append(len(schedules))
        if len(calls) == 10:
            raise KeyboardInterrupt
        return evaluate(self, schedules, **how)

    monkeypatch.setattr(ModelEvaluator, "evaluate", stop_at_the_tenth)
    folder = tmp_path / "cut"
    assert cli.main(words(out=folder, chi="2", fractions="none")) == 130
    assert f"profile --resume {folder}" in capsys.readouterr().err
    assert len(table(folder)) == 9
    calls[:] = [0] * 10
    assert cli.main(["profile", "--resume", str(folder), "--quiet"]) == cli.DONE
    assert sum(calls) == len(table(folder)) - 9
    assert cli.main(["profile", "--resume", str(folder), "--chi", "2,6", "--fractions", "none", "--quiet"]) == cli.DONE
    assert table(folder) == table(tmp_path / "whole")
    loaded = load_model("random:tiny-llama", "cpu")
    assert len(read_profile(folder, loaded)) == len(table(folder))
    for other in ({"digest": "0" * 64}, {"architecture": "0" * 64}):
        with pytest.raises(ValueError, match="profile must be of the same model"):
            read_profile(folder, replace(loaded, **other))
    capsys.readouterr()
    assert cli.main(["profile", "--resume", str(folder), "--tokens", "2000", "--quiet"]) == cli.REFUSED
    assert "is another profile: data was" in capsys.readouterr().err


@pytest.mark.usefixtures("fake_data")
@pytest.mark.slow
def test_a_long_context_measures_what_fills_the_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert cli.main(words(out=folder, context="96", chi="2,4", fractions="none")) == cli.DONE
    found = table(folder)
    assert {one.family for one in found} == {"k", "v"}
    assert json.loads((folder / "profile.json").read_text())["dense"]["tokens"] == 95
    out = capsys.readouterr().out
    full = next(one.chi / one.relative_chi for one in found)
    assert f"k, χ 2    keeps {2 / full:4.0%}, KL {sum(o.kl for o in found if (o.family, o.chi) == ('k', 2)):.4f}" in out
    assert cli.main(["profile", "--resume", str(folder), "--quiet"]) == cli.DONE
    assert table(folder) == found
    assert cli.main(["profile", "--resume", str(folder), "--quiet", "--context", "80"]) == cli.REFUSED
    assert cli.main(words(out=tmp_path / "more", context="9999999")) == cli.REFUSED
    assert "context must be at most" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(context="9"), "context must be a whole number from 64 to 1000000000, got '9'"),
        (dict(chi="0"), "chi must be whole numbers of at least 1, got 0"),
        (dict(chi="ten"), "chi must be comma-separated numbers, START:STOP:STEP, or none, got 'ten'"),
        (dict(chi="90:10:10"), "chi must be comma-separated numbers"),
        (dict(fractions="1"), "fractions must lie between 0 and 1, got 1.0"),
        (dict(fractions="nan"), "fractions must lie between 0 and 1, got nan"),
        (dict(chi="none", fractions="none"), "chi or fractions must name a level"),
        (dict(tokens="9"), "tokens must be a whole number from 64 to 1000000000, got '9'"),
        (dict(budget="9"), "unknown argument '--budget'"),
        (dict(heal_minutes="1"), "unknown argument '--heal-minutes'"),
    ],
)
def test_a_mistake_is_refused_before_any_work(
    changes: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words(out=tmp_path / "run", **changes)) == cli.REFUSED
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_levels_are_numbers_or_a_range_with_both_ends() -> None:
    assert levels_text("chi", "10:90:10", int) == list(range(10, 100, 10))
    assert levels_text("chi", "10,50", int) == [10, 50]
    assert levels_text("fractions", "0.5,0.25", float) == [0.5, 0.25]
    assert levels_text("chi", "none", int) == []


def test_a_chi_that_saves_nothing_is_left_out_and_none_comes_twice() -> None:
    levels = Levels((4, 8, 100), (0.5, 0.01))
    assert levels.of(Site("s", 0, "q", 16, 64)) == [4, 8, 1]
    assert Levels((4,), ()).of(Site("s", 0, "q", 2, 2)) == []


def test_rank_correlation_is_that_of_the_definition() -> None:
    assert rank_correlation([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert np.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
    # Without ties ρ = 1 − 6 Σ d² / (n (n² − 1)).
    generator = np.random.default_rng(0)
    first, second = generator.permutation(9), generator.permutation(9)
    wanted = 1 - 6 * int(((first - second) ** 2).sum()) / (9 * 80)
    assert rank_correlation(first.astype(float), np.exp(second)) == pytest.approx(wanted)
    # With ties it is the correlation of mean ranks: ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3.
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))


def test_a_table_comes_back_from_its_text_as_it_was() -> None:
    rows = [row(0, 4, 0.1 + 1e-17), replace(row(1, 4, 1 / 3), kl=float("nan"), state="failed")]
    again = parse_rows(rows_text(rows))
    assert again[0] == rows[0]
    assert np.isnan(again[1].kl)
    assert again[1].state == "failed"
    with pytest.raises(ValueError, match="the columns must be"):
        parse_rows("a,b\n1,2\n")
    with pytest.raises(ValueError, match="line 2"):
        parse_rows(rows_text(rows).replace("pivoted-lowrank,4", "pivoted-lowrank,four", 1))


def test_tables_sum_over_a_block_and_average_over_chi() -> None:
    rows = [row(block, chi, kl * chi, family) for block, family, kl in ((0, "q", 1.0), (0, "k", 3.0)) for chi in (1, 4)]
    blocks, chis, table = block_by_chi([*rows, row(0, 9, 5.0)])
    assert (blocks, chis, table.tolist()) == ([0], [1, 4], [[4.0, 16.0]])  # χ 9 was not measured everywhere
    blocks, families, means = block_by_family(rows)
    assert (blocks, families) == ([0], ["q", "k"])
    assert means == pytest.approx(np.array([[2.0, 6.0]]))


@pytest.mark.parametrize(
    ("fragility", "verdict"),
    [
        ([2.0**-block for block in range(12)], "Here early blocks are more fragile"),
        ([2.0**block for block in range(12)], "Here late blocks are more fragile"),
        ([1.0, 2.0] * 6, "Here fragility has no clear trend with depth"),
    ],
)
def test_the_summary_says_which_blocks_are_fragile(fragility: list[float], verdict: str) -> None:
    rows = [row(block, chi, kl / chi) for block, kl in enumerate(fragility) for chi in (10, 20)]
    text = summary(rows, "toy")
    assert verdict in text
    worst = max(range(12), key=lambda block: fragility[block])
    assert f"most fragile:  {worst} (" in text
    assert f"The first block costs {fragility[0] / np.median(fragility):.1f} times the median block" in text
    assert "all       1.000  (24 points; measured / predicted, median 1.00)" in text


def test_a_summary_of_little_says_so() -> None:
    assert summary([], "toy") == "toy: nothing measured\n"
    assert "blocks are not compared" in summary([row(0, 4, 0.1)], "toy")


def test_traces_hold_what_was_measured() -> None:
    [trace] = traces([row(0, 8, 0.1), row(0, 4, 0.2), replace(row(0, 2, 0.3), state="nonfinite")]).values()
    assert (trace.source, trace.chi, trace.kl) == ("measured", (4, 8), (0.2, 0.1))
