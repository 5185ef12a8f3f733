"""The contract of all agents, on the toy of three blocks whose optimum is known by exhaustion."""

import functools
import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest

import agents
from agents import AgentContext, Learner
from envs import Problem, Reward, ToyEvaluator, best_by_exhaustion, toy_menu
from search.config import PLANNERS

REWARD = Reward()
ONE_SCHEDULE = ("knapsack", "lagrangian", "uniform")
UNSEEDED = ("gradient",)  # slopes leave nothing to chance, and end where they stand still
BETWEEN = ("gradient", "ppo", "ppo-masked", "reinforce")  # not bound to the levels of an episode
SEARCHERS = tuple(name for name in agents.NAMES if name not in (*ONE_SCHEDULE, *UNSEEDED))
ONE_TARGET = tuple(name for name in SEARCHERS if name not in ("optuna-nsga2", *BETWEEN))  # and levels only


def toy(levels=8):
    return Problem.build(toy_menu(), 0.5, levels=levels)


def affordable(name, budget):
    """The Gaussian process takes half a second a trial once it has begun, after 20 trials: it is tried on two."""
    return min(budget, 22) if name == "optuna-gp" else budget


def run(name, problem, seed=0, budget=None, counts=(10,), rewards=None, until=math.inf):
    """All proposals and their rewards, asked for in groups of `counts`, over and over.

    Args:
        budget: 26 by default, or what is `affordable`.
        rewards: told to the agent instead of the true ones.
        until: a reward at which the search is ended before its budget is spent.
    """
    budget = affordable(name, 26) if budget is None else budget
    agent, evaluate, told = agents.make(name, problem, AgentContext(seed, budget)), ToyEvaluator(problem.menu), []
    for count in itertools.cycle(counts):
        proposals = agent.ask(count)
        assert len(proposals) <= count
        if not proposals:
            assert agent.ask(1) == []
            return told
        values = [REWARD(score) for score in evaluate([proposal.schedule for proposal in proposals])]
        if rewards is not None:
            values = rewards[len(told) : len(told) + len(values)]
        for proposal in proposals:
            if proposal.probe is not None:
                agent.tell_slopes(proposal, evaluate.slopes(proposal.schedule, proposal.probe, proposal.repeat))
        agent.tell(proposals, values)
        told += zip(proposals, values, strict=True)
        if max(values) >= until:
            return told
    raise AssertionError


@functools.cache
def known(name, counts=(10,)):
    """What `run` gives on the toy with seed 0: several tests compare with it, so it is computed once."""
    return run(name, toy(), counts=counts)


def marked(name):
    """The agents whose libraries take seconds over a search are marked slow."""
    return pytest.param(name, marks=pytest.mark.slow) if name in ("optuna-gp", "optuna-qmc") else name


def seeds(name):
    """How many seeds an optimum is looked for with: fewer where a library searches, and takes seconds."""
    return 1 if name == "optuna-gp" else 2 if name.startswith("optuna") else 5


every_agent = pytest.mark.parametrize("name", [marked(name) for name in agents.NAMES])


@every_agent
def test_an_agent_carries_the_name_it_is_made_by(name):
    assert agents.make(name, toy(), AgentContext(0, 1)).name == name


@every_agent
def test_same_seed_and_same_tells_give_the_same_proposals(name):
    assert run(name, toy()) == known(name)


@every_agent
def test_proposals_do_not_depend_on_how_many_are_asked_for_at_once(name):
    assert known(name, (1,)) == run(name, toy(), counts=(3, 10, 4))


@every_agent
def test_a_larger_budget_only_adds_to_a_search_but_where_it_is_planned_with(name):
    short, long = ([one for one, _ in told] for told in (run(name, toy(), budget=14, counts=(1,)), known(name, (1,))))
    assert (short == long[: len(short)]) == (name not in PLANNERS)


@pytest.mark.parametrize("name", [marked(name) for name in SEARCHERS])
def test_another_seed_gives_other_proposals(name):
    assert known(name) != run(name, toy(), seed=1)


@every_agent
@pytest.mark.parametrize("budget", [0, 1, 3, 11, 26])
def test_the_budget_is_kept_and_no_schedule_comes_twice(name, budget):
    proposals = [proposal for proposal, _ in run(name, toy(16), budget=budget, counts=(4,))]
    spent = sum(proposal.cost for proposal in proposals)
    assert spent <= budget
    if name not in UNSEEDED:
        assert spent == (budget if name in SEARCHERS else min(budget, 1))
    assert (spent > 0) == (budget > 0)
    assert len({proposal.schedule.digest for proposal in proposals}) == len(proposals)


@pytest.mark.slow
@pytest.mark.parametrize("name", [marked(name) for name in (*ONE_SCHEDULE, *UNSEEDED, *ONE_TARGET)])
def test_an_exhausted_space_ends_the_search_before_the_budget_does(name):
    # Two levels of three blocks and dense: a handful of schedules.
    problem = toy(levels=4)
    told = run(name, problem, budget=500)
    assert 1 <= len(told) < 100
    # At target 1 there is one schedule, dense.
    assert len(run(name, Problem.build(toy_menu(), 1.0), budget=20)) == 1


@every_agent
@pytest.mark.parametrize("granularity", ["block", "site", "block+family"])
@pytest.mark.parametrize("kind", [{}, {"bonds": True}, {"pruned": True}], ids=["factors", "bonds", "pruned"])
def test_actions_are_legal_and_lead_to_the_schedule(name, granularity, kind):
    problem = Problem.build(toy_menu(**kind), 0.4, granularity)
    for proposal, _ in run(name, problem):
        if proposal.actions is not None:
            assert len(proposal.actions) == problem.steps
            assert all(problem.mask(proposal.actions[:step])[level] for step, level in enumerate(proposal.actions))
            assert problem.schedule(proposal.actions) == proposal.schedule


@pytest.mark.slow
@every_agent
def test_failures_do_not_stop_an_agent(name):
    problem, budget = toy(16), affordable(name, 36)
    for rewards in ([math.nan] * 36, [-30.0] * 36, [-math.inf, 0.1, 0.2] * 12):
        told = run(name, problem, budget=budget, rewards=rewards)
        spent = sum(proposal.cost for proposal, _ in told)
        assert spent == (budget if name in SEARCHERS else spent if name in UNSEEDED else 1)


@pytest.mark.slow
@pytest.mark.parametrize("name, seed", [(name, seed) for name in ONE_TARGET for seed in range(seeds(name))])
def test_the_optimum_of_three_blocks_is_found(name, seed):
    problem = toy()
    schedule, reward = best_by_exhaustion(problem, ToyEvaluator(problem.menu), REWARD)
    budget = 45 if name == "optuna-gp" else 400  # it needs fewer, and more time for each
    found, value = max(run(name, problem, seed, budget, until=reward), key=lambda pair: pair[1])
    assert value == reward
    assert found.schedule == schedule
    assert schedule != problem.closed_form()


@pytest.mark.slow
@pytest.mark.parametrize("name", BETWEEN)
def test_slopes_lead_past_the_best_of_all_episodes(name):
    problem = toy()
    _, reward = best_by_exhaustion(problem, ToyEvaluator(problem.menu), REWARD)
    assert max(value for _, value in run(name, problem, budget=400)) > reward


@pytest.mark.parametrize("name", [marked(name) for name in agents.NAMES])
def test_widths_of_bonds_are_searched_as_bond_dimensions_are(name):
    told = run(name, Problem.build(toy_menu(bonds=True), 0.5, levels=8))
    # The toy prices its units as it prices the matrices in their place.
    assert [reward for _, reward in told] == [reward for _, reward in known(name)]
    found = max(told, key=lambda pair: pair[1])[0].schedule
    assert any(choice.widths for _, choice in found)
    assert found["blocks.1.mlp.up"].widths == found["blocks.1.mlp.down"].widths


@pytest.mark.parametrize("name", [marked(name) for name in agents.NAMES])
def test_densities_are_searched_as_bond_dimensions_are(name):
    told = run(name, Problem.build(toy_menu(pruned=True), 0.5, levels=8))
    # The toy prices its pruned matrices as it prices the χ in their place.
    assert [reward for _, reward in told] == [reward for _, reward in known(name)]
    found = max(told, key=lambda pair: pair[1])[0].schedule
    assert len({choice.topology for _, choice in found} & {"sparse", "lowrank"}) >= (1 if name in ONE_SCHEDULE else 2)


@every_agent
def test_the_ask_tell_contract_is_enforced(name):
    agent = agents.make(name, toy(), AgentContext(0, 5))
    with pytest.raises(ValueError, match="at least 1"):
        agent.ask(0)
    (proposal,) = agent.ask(1)
    with pytest.raises(ValueError, match="one reward"):
        agent.tell([proposal], [])
    with pytest.raises(ValueError, match="never asked for"):
        agent.tell([agents.Proposal(toy_menu_dense(), None)], [0.0])
    agent.tell([proposal], [0.0])
    with pytest.raises(ValueError, match="told before"):
        agent.tell([proposal], [0.0])


def toy_menu_dense():
    return Problem.build(toy_menu(), 1.0).closed_form()


@pytest.mark.parametrize(
    "name, nearest",
    [("renforce", "reinforce"), ("rand", "random"), ("lagrange", "lagrangian"), ("optuna", "optuna-gp")],
)
def test_an_unknown_agent_is_refused_with_the_nearest_name(name, nearest):
    with pytest.raises(ValueError, match=f"nearest: {nearest}"):
        agents.make(name, toy(), AgentContext(0, 5))


def test_a_library_that_is_not_installed_is_named_with_the_extra_that_brings_it(monkeypatch):
    for module in ("agents.ppo", "agents.ladder_policy", "agents.sb3_episodes", "stable_baselines3"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Without("stable_baselines3", "sb3_contrib"), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "sb3_contrib", raising=False)
    with pytest.raises(ValueError, match=r"agent ppo needs sb3_contrib, .*pip install 'chisel-prior\[agents\]'"):
        agents.make("ppo", toy(), AgentContext(0, 5))


class _Without:
    """Finds nothing of some packages, as if they were not installed."""

    def __init__(self, *names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_agents_are_imported_without_the_libraries_of_some():
    libraries = ("stable_baselines3", "sb3_contrib", "optuna", "cmaes")
    code = f"import sys, agents; sys.exit(sum(name in sys.modules for name in {libraries}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], timeout=120).returncode == 0


@every_agent
def test_a_policy_is_continued_or_refused(name):
    start = agents.make("reinforce", toy(), AgentContext(0, 5)).saved_policy()
    agent = agents.make(name, toy(), AgentContext(0, 5))
    context = AgentContext(0, 5, policy=agent.saved_policy() if isinstance(agent, Learner) else start)
    if isinstance(agent, Learner):
        assert agents.make(name, toy(), context).ask(1) == agent.ask(1)
    else:
        with pytest.raises(ValueError, match=f"agent {name} learns no policy"):
            agents.make(name, toy(), context)


@pytest.mark.parametrize("name, value, least", [("seed", -1, 0), ("budget", -1, 0), ("shards", 0, 1)])
def test_terms_outside_their_range_are_refused(name, value, least):
    with pytest.raises(ValueError, match=f"{name} must be at least {least}, got {value}"):
        AgentContext(**{"seed": 0, "budget": 1, name: value})


def test_single_proposals_are_what_they_say():
    problem = toy()
    assert [p.schedule for p, _ in run("uniform", problem)] == [problem.uniform()]
    assert [p.schedule for p, _ in run("lagrangian", problem)] == [problem.closed_form()]
    assert [p.schedule for p, _ in run("knapsack", problem)] == [problem.knapsack()]
