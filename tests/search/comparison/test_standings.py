"""What the figures of a contest say: intervals against truth, and one report and plot of all agents."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict
from xml.etree import ElementTree

import numpy as np
import pytest

from compression.refusal import Refusal
from search.comparison.standings import Entry, Heldout, Mark, check, contrast, plot, report
from search.evaluation.quality import Quality

TOKENS = (40, 0, 60, 50, 30, 80, 20, 60)


def measured(level: float, noise: object = 0.0) -> Heldout:
    """KL of `level` nats per token in every sequence, plus `noise` by sequence."""
    sums = tuple(float(value) for value in np.array(TOKENS) * (level + np.zeros(len(TOKENS)) + noise))
    return Heldout(sum(sums) / sum(TOKENS), 50.0, 0.3, sums, TOKENS)


def entry(agent: str, seed: int, digests: list[str], selected: str) -> Entry:
    marks = tuple(Mark(10 * (1 + number), 1000 * (1 + number), digest) for number, digest in enumerate(digests))
    return Entry(agent, seed, marks, (digests[-1],), selected, 2.0, 30.0)


def test_equal_differences_in_all_sequences_leave_no_doubt() -> None:
    result = contrast([measured(0.3)], [measured(0.4)])
    assert result.value == pytest.approx(-0.1)
    assert result.relative == pytest.approx(-0.25)
    assert result.standard_error == pytest.approx(0, abs=1e-12)


def test_seeds_that_differ_widen_the_interval() -> None:
    alike = contrast([measured(0.3), measured(0.3)], [measured(0.4)])
    apart = contrast([measured(0.2), measured(0.4)], [measured(0.4)])
    assert alike.value == pytest.approx(apart.value)
    assert alike.standard_error < 1e-9
    assert apart.standard_error == pytest.approx(0.1)  # a standard deviation of 0.1·√2 over two seeds
    assert apart.low < apart.relative < apart.high


def test_the_interval_covers_the_truth_nineteen_times_in_twenty() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        hard = generator.normal(0, 0.1, len(TOKENS))  # shared by both sides, and gone in the paired difference
        seeds = generator.normal(0, 0.02, 3)
        first = [measured(0.3 + seed, hard + generator.normal(0, 0.02, len(TOKENS))) for seed in seeds]
        second = [measured(0.4, hard)]
        result = contrast(first, second)
        covered += abs(result.value + 0.1) < 1.96 * result.standard_error
    assert 0.85 < covered / 400 <= 1


def test_the_report_ranks_agents_and_says_what_each_is_against_the_best() -> None:
    heldout = {"base": measured(0.4), "good": measured(0.3), "fair": measured(0.36), "bad": measured(0.5)}
    entries = [
        entry("random", 0, ["bad", "base"], "base"),
        entry("reinforce", 0, ["fair", "good"], "good"),
        entry("reinforce", 1, ["base", "good"], "good"),
    ]
    text = report(entries, heldout, "base", "a model")
    lines = [line for line in text.splitlines() if line.startswith("| r")]
    assert lines[0].startswith("| reinforce | 2 | 20 | 2,000 |")
    assert "-25.0% (-25.0% to -25.0%)" in lines[0]
    assert lines[1].startswith("| random | 1 | 20 | 2,000 | +25.0% (+25.0% to +25.0%) | +0.0%")
    assert "| +33.3% (+33.3% to +33.3%) |" in lines[1]
    assert "| 0.100 |" in lines[0]  # seconds of its own a trial
    assert "340 tokens in 7 sequences" in text


def test_the_report_shows_every_corpus_by_itself() -> None:
    base, good = (
        dataclasses.replace(measured(level), kl_by_corpus={"prose": level, "unseen": unseen})
        for level, unseen in ((0.4, 0.5), (0.3, 0.55))
    )
    text = report([entry("gradient", 0, ["good"], "good")], {"base": base, "good": good}, "base", "a model")
    assert "| KL prose | KL unseen |" in text
    assert "| -25.0% | +10.0% |" in text


def test_the_plot_is_one_svg_that_does_not_depend_on_when_it_is_made() -> None:
    heldout = {"base": measured(0.4), "good": measured(0.3)}
    entries = [entry("reinforce", seed, ["base", "good"], "good") for seed in (0, 1)]
    first = plot(entries, heldout, "base")
    assert first == plot(entries, heldout, "base")
    assert ElementTree.fromstring(first).tag.endswith("svg")
    assert "reinforce" in first
    assert "evaluated tokens" in first


def test_figures_survive_being_written() -> None:
    one, of = measured(0.3), entry("random", 3, ["a", "b"], "b")
    assert Heldout.of({**asdict(one), "kl_by_sequence": list(one.kl_by_sequence)}) == one
    assert Entry.of(asdict(of)) == of
    for wrong in ({"more": 1}, {"kl": "x"}, {"kl": float("nan")}, {"tokens_by_sequence": [-1]}):
        with pytest.raises(Refusal):
            Heldout.of({**asdict(one), **wrong})
    for wrong in ({"marks": []}, {"marks": [{}]}, {"marks": 3}, {"seed": "x"}, {"agent": None}, {"finalists": "ab"}):
        with pytest.raises(Refusal):
            Entry.of({**asdict(of), **wrong})


def test_parts_of_a_comparison_that_do_not_belong_together_are_refused() -> None:
    heldout = {"base": measured(0.4), "good": measured(0.3)}
    entries = [entry("reinforce", 0, ["base", "good"], "good")]
    check(entries, heldout, "base", [])
    check([], {}, "", [])
    check(entries, {}, "base", ["base", "good"])
    shorter = dataclasses.replace(measured(0.3), kl_by_sequence=(1.0,))
    for parts in (
        ([*entries, entry("random", 0, ["base"], "base")], heldout, "base", []),
        (entries, {**heldout, "good": shorter}, "base", []),
        (entries, {"base": measured(0.4)}, "base", []),
        (entries, heldout, "gone", []),
        ([entry("reinforce", 0, ["base", "good"], "gone")], heldout, "base", []),
    ):
        with pytest.raises(Refusal):
            check(*parts)


def test_a_schedule_without_figures_has_no_place_in_a_table() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        Heldout.from_quality(Quality())
