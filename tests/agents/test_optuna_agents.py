import importlib.util
import itertools
import math
import random

import numpy as np
import pytest
import torch

import agents
from agents import AgentContext
from agents.optuna_agents import OptunaSettings
from agents.optuna_pareto import OptunaPareto
from envs import Problem, Reward, ToyEvaluator, toy_menu

PLAIN = Reward(compression_weight=0.0, correct_weight=0.0)  # −KL
WEIGHTS = (1.6, 0.7, 1.0, 0.5, 1.3, 0.9, 2.0)
NAMES = [name for name in agents.NAMES if name.startswith("optuna-")]
every_sampler = pytest.mark.parametrize("name", NAMES)


def search(agent, evaluate, reward=PLAIN):
    told = []
    while proposals := agent.ask(8):
        values = [reward(score) for score in evaluate([proposal.schedule for proposal in proposals])]
        agent.tell(proposals, values)
        told += zip(proposals, values, strict=True)
    return told


@every_sampler
def test_the_first_proposal_is_the_closed_form(name):
    task = Problem.build(toy_menu(), 0.5, "block+family")
    (first, *_) = agents.make(name, task, AgentContext(3, 20)).ask(5)
    assert first.schedule == task.closed_form()
    assert first.actions == (task.middle,) * task.steps


@pytest.mark.parametrize("name, package", [("cmaes", "cmaes"), ("gp", "scipy"), ("qmc", "scipy")])
def test_a_missing_package_is_one_line_that_names_the_extra(name, package, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == package else there(wanted))
    with pytest.raises(ValueError, match=rf"^agent optuna-{name} needs {package}, .*chisel-prior\[agents\]'$"):
        agents.make(f"optuna-{name}", Problem.build(toy_menu(), 0.5), AgentContext(0, 5))


@every_sampler
def test_the_global_generators_are_left_as_they_were(name):
    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    before = state()
    task = Problem.build(toy_menu(), 0.5)
    search(agents.make(name, task, AgentContext(0, 22)), ToyEvaluator(task.menu))
    assert state() == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optuna-cmaes", "optuna-qmc", "optuna-tpe"])
def test_twenty_blocks_end_below_the_closed_form(name):
    task = Problem.build(toy_menu(20), 0.6, "block+family")
    evaluate = ToyEvaluator(task.menu, WEIGHTS, 0.1)
    agent = agents.make(name, task, AgentContext(0, 100))
    told = search(agent, evaluate)
    assert len(told) == 100
    assert PLAIN(evaluate([agent.recommend(1)[0].schedule])[0]) > told[0][1]


@every_sampler
def test_recommendations_are_different_and_keep_at_most_the_target(name):
    task = Problem.build(toy_menu(6), 0.6)
    budget = 22 if name == "optuna-gp" else 30  # it takes half a second a trial after the first 20
    agent = agents.make(name, task, AgentContext(0, budget, compression_weight=0.0))
    assert agent.recommend(3) == []
    search(agent, ToyEvaluator(task.menu))
    best = agent.recommend(5)
    assert len({proposal.schedule.digest for proposal in best}) == 5
    for proposal in best:
        assert task.kept(proposal.schedule) <= task.target_kept
        assert task.schedule(proposal.actions) == proposal.schedule


def test_the_study_is_told_the_highest_rung_where_dense_is_illegal():
    task = Problem.build(toy_menu(), 0.4)
    agent = agents.make("optuna-tpe", task, AgentContext(0, 60))
    search(agent, ToyEvaluator(task.menu))
    for trial in agent._study.trials:
        point = tuple(trial.params[name] for name in task.names)
        if trial.value is not None:
            assert agent._taken(point) == point


def test_a_failure_is_told_no_deeper_than_it_teaches():
    task = Problem.build(toy_menu(6), 0.6)
    agent = agents.make("optuna-tpe", task, AgentContext(0, 20, compression_weight=0.0))
    proposals = agent.ask(20)
    agent.tell(proposals[:1], [-0.4])
    agent.tell(proposals[1:3], [-30.0, math.nan])
    values = sorted(trial.value for trial in agent._study.trials if trial.value is not None)
    assert values == pytest.approx([-1.6, -1.6, -0.4])


def pareto(budget=60, target=0.5, seed=0, weight=1.0):
    task = Problem.build(toy_menu(), target)
    return OptunaPareto(task, AgentContext(seed, budget, compression_weight=weight)), task


@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_the_front_is_what_no_trial_beats_in_both(weight):
    agent, task = pareto(weight=weight)
    evaluate = ToyEvaluator(task.menu)
    told = search(agent, evaluate, Reward(compression_weight=weight, correct_weight=0.0))
    # Without its term for compression the reward is −KL, whatever the weight.
    points = {p.schedule.digest: (task.kept(p.schedule), -evaluate([p.schedule])[0].kl) for p, _ in told}
    unbeaten = {
        digest
        for digest, (kept, quality) in points.items()
        if not any(k <= kept and q >= quality and (k, q) != (kept, quality) for k, q in points.values())
    }
    front = agent.front()
    assert {proposal.schedule.digest for _, _, proposal in front} == unbeaten
    for kept, quality, proposal in front:
        assert (kept, quality) == pytest.approx(points[proposal.schedule.digest])
    for (less, worse, _), (more, better, _) in itertools.pairwise(front):
        assert less < more
        assert worse < better


def test_the_front_spans_the_targets_around_the_tasks():
    agent, task = pareto(120)
    told = search(agent, ToyEvaluator(task.menu), Reward(correct_weight=0.0))
    front = agent.front()
    assert front[0][0] < 0.45
    assert front[-1][0] > 0.55
    assert all(0.38 < kept <= 0.6 + 1e-9 for kept, _, _ in front)
    for proposal, _ in told:
        if proposal.actions is None:
            continue
        assert task.schedule(proposal.actions) == proposal.schedule


def test_targets_stay_within_what_the_menu_can_reach():
    least = toy_menu().smallest_parameters / toy_menu().dense_parameters
    low, _ = pareto(target=least + 0.025)
    assert [task.target_kept - least > 0 for task in low._by_target] == [True] * len(low._by_target)
    assert low._own == 2
    high, _ = pareto(target=0.97)
    assert high._by_target[-1].target_kept == 1.0
    assert len(pareto(target=0.5)[0]._by_target) == 1 + 2 * round(OptunaSettings().around / OptunaSettings().grid)
