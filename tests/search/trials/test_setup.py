"""A search of an agent that worked differently under the same name is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

import agents
from search.config import Config
from search.trials.journal import Journal
from search.trials.setup import refuse_earlier_agent


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
