"""A search that an earlier version would have gone on with differently is refused, and the message says why."""

from __future__ import annotations

from pathlib import Path

import pytest

import agents
from search.config import Config
from search.trials.journal import Journal, refuse_another
from search.trials.setup import fingerprint_defaults, refuse_earlier_agent


@pytest.mark.parametrize("stored", [{}, {"method": "another"}])
def test_the_journal_of_an_earlier_reinforce_is_refused_by_name(stored: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    refuse_earlier_agent(path, Config.of({"agent": "reinforce"}))  # there is none yet
    Journal(path, stored).close()
    with pytest.raises(ValueError, match="an earlier agent of the name reinforce, which this version cannot continue"):
        refuse_earlier_agent(path, Config.of({"agent": "reinforce"}))


@pytest.mark.parametrize("agent", ["reinforce", "gradient"])
def test_a_journal_of_the_same_agent_goes_on(agent: str, tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    Journal(path, {"method": agents.METHODS[agent]} if agent in agents.METHODS else {}).close()
    refuse_earlier_agent(path, Config.of({"agent": agent}))


def test_a_journal_whose_kl_counted_instructions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    Journal(path, {"model": "digest"}).close()
    with pytest.raises(ValueError, match="kl_counts was instructions of items too, is no instructions of items"):
        refuse_another(path, {"model": "digest", "kl_counts": "no instructions of items"}, fingerprint_defaults())
