"""Options of a healing: what is out of range is refused first, and the shortest healing has text."""

import pytest
import torch

from search import cli
from search.healing.plan import HealingOptions, HealingPlan, text_tokens

CPU = torch.device("cpu")


@pytest.mark.parametrize("options", [{"minutes": 1e-300}, {"minutes": 0.005}, {"tokens": 1}])
def test_the_shortest_healing_has_a_row_of_text(options):
    asked = HealingOptions(**options)
    assert text_tokens(asked.plan(0, CPU), CPU, asked) == asked.row_tokens


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--minutes", "inf"], "minutes must be above 0 and at most 100,000, got inf"),
        (["--minutes", "1e308"], "minutes must be above 0 and at most 100,000, got 1e+308"),
        (["--tokens", "0"], "tokens must be above 0 and at most 1,000,000,000,000, got 0"),
        (["--row-tokens", "1"], "row_tokens must be a whole number from 16 to 65536, got 1"),
        (["--text-tokens", "5"], "text_tokens must be at least the 256 of a row"),
        (["--hidden-weight", "nan"], "hidden_weight must be a number from 0 to 1,000, got nan"),
        (["--hidden-weight", "-1"], "hidden_weight must be a number from 0 to 1,000, got -1.0"),
        (["--rate", "inf"], "rate must be above 0 and at most 1,000, got inf"),
        (["--data", "nonsense"], "data must be text, sampled,"),
        (["--data", "text+nonsense"], "or a hub id, got 'nonsense'"),
        (["--data", "nowhere.json"], "data must be an existing file if it ends with .json, got 'nowhere.json'"),
    ],
)
def test_an_option_out_of_range_is_refused_before_the_run_is_looked_for(words, message, capsys):
    assert cli.main(["heal", "nowhere", *words]) == cli.REFUSED
    assert message in capsys.readouterr().err


def test_the_rate_is_lower_where_little_can_be_gained_and_a_given_one_is_taken_as_it_is():
    plan, gpu = (HealingOptions().plan(0, torch.device(name)) for name in ("cpu", "cuda"))
    assert plan.rates(0.8)["cores"] == plan.rates(5.0)["cores"] == pytest.approx(8e-5)
    assert plan.rates(0.05)["cores"] == pytest.approx(1e-5)
    assert (plan.rates(0.2)["vectors"], plan.rates(0.2)["scales"]) == (3e-4, 1e-3)
    assert plan.rates(0.015)["vectors"] == pytest.approx(3e-5)
    assert plan.rates(0.015)["scales"] == pytest.approx(1e-4)
    assert gpu.rates(1.0)["cores"] == pytest.approx(2e-4, rel=0.01)
    assert HealingPlan(minutes=1, rate=2e-4).rates(0.1)["cores"] == 2e-4
