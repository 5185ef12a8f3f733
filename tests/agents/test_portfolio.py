import pytest

from agents import AgentContext, Turns, TurnsSettings, make
from envs import Problem, Reward, ToyEvaluator, toy_menu

PLAIN = Reward(compression_weight=0.0, correct_weight=0.0)  # −KL


def problem(blocks=8):
    return Problem.build(toy_menu(blocks), 0.6)


def search(agent, reward, count=7):
    told = []
    while proposals := agent.ask(count):
        rewards = [reward(proposal) for proposal in proposals]
        agent.tell(proposals, rewards)
        told += zip(proposals, rewards, strict=True)
    return told


def truth(task):
    evaluate = ToyEvaluator(task.menu)
    return lambda proposal: PLAIN(evaluate([proposal.schedule])[0])


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 3])
def test_no_look_is_evaluated_twice_and_members_are_told_what_they_proposed(shards):
    task = problem()
    agent = Turns(task, AgentContext(0, 90, shards))
    told = search(agent, truth(task))
    rewards = {(proposal.schedule.digest, proposal.repeat): reward for proposal, reward in told}
    assert len(rewards) == len(told) == 90
    agent.recommend(1)
    closed = task.closed_form().digest
    for member in agent._members:
        assert member.waiting == []
        assert member.rewards[closed][0] == rewards[closed, 0]
        known = [reward for digest in member.rewards for reward in member.rewards[digest]]
        assert set(known) <= set(rewards.values())
    # The closed form was paid for once, and told to all.
    assert sum(sum(map(len, member.rewards.values())) for member in agent._members) >= 90 + len(agent._members) - 1


def test_every_member_gets_a_slice_and_the_best_one_the_rest():
    task = problem()
    settings = TurnsSettings(members=("random", "bandit"), slice=10)
    agent, count = Turns(task, AgentContext(0, 80), settings), iter(range(100))
    search(agent, lambda _: float(10 <= next(count) < 20))
    agent.recommend(1)
    sizes = [len(member.rewards) for member in agent._members]
    assert sizes[0] == 10
    assert sizes[1] >= 70


def test_a_member_that_has_finished_leaves_the_budget_to_the_others():
    task = problem()
    agent = Turns(task, AgentContext(0, 40), TurnsSettings(members=("lagrangian", "random"), slice=10))
    told = search(agent, lambda proposal: 1.0 if proposal.schedule == task.closed_form() else 0.0)
    assert len(told) == 40
    assert agent.recommend(1)[0].schedule == task.closed_form()


def test_a_portfolio_is_not_told_apart_by_the_size_of_what_is_asked_for():
    task = problem()
    settings = TurnsSettings(members=("random", "evolution", "random"), slice=6)
    runs = [search(Turns(task, AgentContext(0, 50, shards=3), settings), truth(task), count) for count in (1, 50)]
    assert runs[0] == runs[1]


def test_asking_on_before_telling_is_allowed():
    task = problem()
    agent, reward = Turns(task, AgentContext(0, 60)), truth(task)
    early = [proposal for _ in range(4) for proposal in agent.ask(10)]
    assert len({proposal.schedule.digest for proposal in early}) == len(early) > 20
    for proposal in reversed(early):
        agent.tell([proposal], [reward(proposal)])
    assert len(early) + len(search(agent, reward)) == 60


def test_it_recommends_from_all_members():
    task = problem()
    agent = Turns(task, AgentContext(0, 60))
    told = search(agent, truth(task))
    recommended = agent.recommend(5)
    assert len({proposal.schedule.digest for proposal in recommended}) == 5
    union = {p.schedule.digest for member in agent._members for p in member.agent.recommend(5)}
    assert {proposal.schedule.digest for proposal in recommended} <= union
    assert truth(task)(recommended[0]) > 1.03 * max(reward for _, reward in told)


@pytest.mark.slow
def test_the_portfolio_takes_turns_around_what_slopes_found():
    task = problem(12)
    evaluate = ToyEvaluator(task.menu, weights=(3.0, 0.5, 1.0), interaction=0.4)
    agent = make("portfolio", task, AgentContext(0, 120))
    assert agent.name == "portfolio"
    costs, rewards = [], []
    while proposals := agent.ask(1):
        [proposal] = proposals
        if proposal.probe is not None:
            agent.tell_slopes(proposal, evaluate.slopes(proposal.schedule, proposal.probe))
        rewards.append(PLAIN(evaluate([proposal.schedule])[0]))
        costs.append(proposal.cost)
        agent.tell(proposals, rewards[-1:])
    assert costs[0] == 4
    assert costs == sorted(costs, reverse=True)
    assert sum(costs) == 120
    assert all(member.rewards for member in agent._follower._members)
    best = PLAIN(evaluate([agent.recommend(1)[0].schedule])[0])
    assert best > 0.2 * rewards[0]


@pytest.mark.parametrize("members", [(), ("portfolio",), ("random", "gradient"), ("guided",)])
def test_turns_without_members_or_with_one_that_proposes_no_episodes_are_refused(members):
    with pytest.raises(ValueError, match="members must be agents that propose episodes"):
        Turns(problem(), AgentContext(0, 5), TurnsSettings(members=members))


def test_an_unknown_member_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="nearest: bandit"):
        Turns(problem(), AgentContext(0, 5), TurnsSettings(members=("bandits",)))
