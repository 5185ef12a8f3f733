"""The example scripts run as they stand, with small numbers."""

import pytest

from examples import train_ppo


def test_an_off_the_shelf_agent_trains_and_a_second_run_measures_nothing(tmp_path, capsys):
    words = ["--episodes", "120", "--blocks", "3", "--table", str(tmp_path / "scores.json")]
    train_ppo.main(words)
    first = capsys.readouterr().out
    assert "closed form KL" in first
    measured = int(first.splitlines()[-1].split()[0])
    assert measured > 10
    train_ppo.main(words)
    second = capsys.readouterr().out
    assert second.splitlines() == [first.splitlines()[0], first.splitlines()[1].replace(f"{measured}", "0", 1)]


def test_a_file_that_is_no_table_is_refused_before_training(tmp_path):
    (tmp_path / "scores.json").write_text("no")
    with pytest.raises(ValueError, match="no table of scores"):
        train_ppo.main(["--table", str(tmp_path / "scores.json")])
