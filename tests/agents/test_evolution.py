import numpy as np
import pytest

from agents import AgentContext, Evolution, EvolutionSettings, RandomSearch
from envs import Problem, Reward, ToyEvaluator, toy_menu

PLAIN = Reward(compression_weight=0.0, correct_weight=0.0)  # −KL
WEIGHTS = (1.6, 0.7, 1.0, 0.5, 1.3, 0.9, 2.0)
UNSCREENED = 10**9


def problem(blocks=12, target=0.6, granularity="block"):
    return Problem.build(toy_menu(blocks), target, granularity)


def search(agent, reward):
    """All proposals and rewards, batch by batch."""
    told = []
    while proposals := agent.ask(8):
        rewards = [reward(proposal) for proposal in proposals]
        agent.tell(proposals, rewards)
        told += zip(proposals, rewards, strict=True)
    return told


def truth(task, interaction=0.1):
    evaluate = ToyEvaluator(task.menu, WEIGHTS, interaction)
    return lambda proposal: PLAIN(evaluate([proposal.schedule])[0])


def test_the_closed_form_is_the_first_parent_and_its_offspring_are_a_few_switches_away():
    task = problem(granularity="block+family")
    agent = Evolution(task, AgentContext(0, 9), EvolutionSettings(screened=UNSCREENED))
    first, *offspring = agent.ask(9)
    assert first.schedule == task.closed_form()
    for proposal in offspring:
        assert 1 <= (np.array(proposal.actions) != task.middle).sum() <= 2 * agent.settings.switches


def test_with_one_look_the_parent_is_the_best_schedule_so_far():
    task = problem()
    agent = Evolution(task, AgentContext(1, 80), EvolutionSettings(screened=UNSCREENED))
    told = search(agent, truth(task))
    agent.recommend(1)  # the last generation meets the parent
    rewards = [reward for _, reward in told]
    assert truth(task)(agent.parent) == max(rewards) > rewards[0]


def test_offspring_are_looked_at_in_stages_and_the_parent_as_often_as_its_challengers():
    task = problem()
    agent = Evolution(task, AgentContext(0, 12, shards=3))
    told = [(proposal.schedule.digest, proposal.repeat) for proposal, _ in search(agent, truth(task))]
    parent = task.closed_form().digest
    assert [repeat for _, repeat in told] == [0] * 9 + [1] * 3
    assert (parent, 1) in told
    best = sorted(agent.records.values(), key=lambda record: -record.rewards[0])
    survivors = {task.schedule(record.levels).digest for record in best if record.levels != (task.middle,) * 12}
    assert {digest for digest, repeat in told if repeat == 1} - {parent} <= survivors


@pytest.mark.parametrize("shards", [1, 2, 6])
def test_every_look_counts_against_the_budget_and_comes_once(shards):
    task = problem()
    told = search(Evolution(task, AgentContext(0, 60, shards)), truth(task))
    keys = [(proposal.schedule.digest, proposal.repeat) for proposal, _ in told]
    assert len(keys) == len(set(keys)) == 60
    assert {repeat for _, repeat in keys} == set(range(min(shards, 3)))
    for digest, repeat in keys:
        assert repeat == 0 or keys.index((digest, repeat - 1)) < keys.index((digest, repeat))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("screened", [20, UNSCREENED])
def test_twenty_blocks_end_below_the_closed_form_and_random_search(seed, screened):
    task = problem(20, granularity="block+family")
    reward = truth(task)
    rewards = [
        value
        for _, value in search(Evolution(task, AgentContext(seed, 100), EvolutionSettings(screened=screened)), reward)
    ]
    assert -max(rewards) < (0.85 if screened == 20 else 0.95) * -rewards[0]
    assert max(rewards) > max(value for _, value in search(RandomSearch(task, AgentContext(seed, 100)), reward))


def test_a_failed_look_takes_a_schedule_out():
    task = problem()
    reward, count = truth(task), iter(range(1000))
    told = search(
        agent := Evolution(task, AgentContext(0, 90, shards=3)), lambda p: np.nan if next(count) % 7 == 3 else reward(p)
    )
    failed = {proposal.schedule.digest for proposal, value in told if np.isnan(value)}
    assert failed
    assert agent.parent.schedule.digest not in failed
    assert reward(agent.recommend(1)[0]) > reward(told[0][0])
