import itertools

import numpy as np
import pytest

from compression.allocation.closed_form import lagrangian, to_schedule, uniform
from compression.schedule import DENSE
from envs import GRANULARITIES, Problem, toy_menu
from envs.problem import OBSERVATION


def kept(problem, schedule):
    menu = problem.menu
    return sum(int(s.parameters[s.index(schedule)]) for s in menu.sites)


def menu_for(granularity, blocks=3):
    return toy_menu(blocks, heads=2 if granularity == "head" else 0)


def prefixes(problem, count=50):
    generator = np.random.default_rng(0)
    for _ in range(count):
        prefix = []
        yield tuple(prefix)
        for _ in range(problem.steps):
            prefix.append(int(generator.choice(np.flatnonzero(problem.mask(prefix)))))
            yield tuple(prefix)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("target", [0.2, 0.5, 0.8, 1.0])
def test_all_middle_is_the_closed_form_exactly(granularity, target):
    menu = menu_for(granularity)
    problem = Problem.build(menu, target, granularity)
    closed_form = to_schedule(menu, lagrangian(menu, problem.target_parameters))
    assert problem.offsets[problem.middle] == 0
    assert problem.closed_form() == closed_form
    assert problem.schedule((problem.middle,) * problem.steps) == closed_form
    assert problem.uniform() == to_schedule(menu, uniform(menu, problem.target_parameters))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_legal_episode_meets_the_target_within_one_step_of_chi(granularity):
    problem = Problem.build(menu_for(granularity, 4), 0.6, granularity)
    step = max(int(np.diff(site.parameters[:-1]).max()) for site in problem.menu.sites)
    for prefix in prefixes(problem):
        if len(prefix) == problem.steps:
            schedule = problem.schedule(prefix)
            short = problem.target_parameters - kept(problem, schedule)
            assert short >= 0
            # Too little for the next χ of any site, unless what is not dense stands right below it.
            assert short <= step or all(s.taken(schedule) in s.choices[-2:] for s in problem.menu.sites)


def test_one_offset_for_all_changes_nothing():
    problem = Problem.build(toy_menu(), 0.5)
    rungs = range(problem.levels - 1)
    assert {problem.schedule((level,) * problem.steps).digest for level in rungs} == {problem.closed_form().digest}


def test_a_higher_rung_moves_parameters_to_the_group():
    problem = Problem.build(toy_menu(), 0.5)
    shares = [[problem.share(step, level) for level in range(problem.levels)] for step in range(problem.steps)]
    assert all((np.diff(row) >= 0).all() and row[-1] == 1 and row[0] > 0 for row in shares)
    assert all(row[-2] > row[0] for row in shares)

    def block(actions):
        schedule = problem.schedule(actions)
        menus = [s for s in problem.menu.sites if s.site.block == 1]
        return sum(int(s.parameters[s.choices.index(schedule[s.site.name])]) for s in menus)

    m = problem.middle
    assert block((m, 0, m)) < block((m, m, m)) < block((m, problem.levels - 2, m))


def test_the_last_level_keeps_the_whole_group_dense():
    problem = Problem.build(toy_menu(), 0.5)
    schedule = problem.schedule((problem.middle, problem.dense_level, problem.middle))
    assert all(schedule[s.site.name] == DENSE for s in problem.menu.sites if s.site.block == 1)


def test_weights_of_block_and_family_add_up():
    problem = Problem.build(toy_menu(), 0.5, "block+family")
    levels = np.array([9, 6, 5, 8, 7])
    block, family = problem.offsets[levels[:3]], problem.offsets[levels[3:]]
    weights = np.array(
        [block[s.site.block] + family[("attention", "mlp").index(s.site.family)] for s in problem.menu.sites]
    )
    expected = to_schedule(problem.menu, lagrangian(problem.menu, problem.target_parameters, weights))
    assert [group.name for group in problem.groups[2:4]] == ["block_02", "family_attention"]
    assert problem.schedule(levels.tolist()) == expected


def test_the_mask_forbids_exactly_what_cannot_meet_the_target():
    problem = Problem.build(toy_menu(), 0.5, "site", levels=4)
    menu = problem.menu
    for prefix in itertools.product((problem.middle, problem.dense_level), repeat=3):
        dense = {*np.flatnonzero(np.array(prefix) == problem.dense_level), 3}
        needed = sum(int(s.parameters[-1 if i in dense else 0]) for i, s in enumerate(menu.sites))
        mask = problem.mask(prefix)
        assert mask[:-1].all()
        assert mask[-1] == (needed <= problem.target_parameters)
    assert not problem.mask((problem.dense_level,) * 3)[-1]


def test_a_schedule_without_room_is_refused():
    problem = Problem.build(toy_menu(), 0.5)
    with pytest.raises(ValueError, match="no room"):
        problem.schedule((problem.dense_level,) * 3)
    with pytest.raises(ValueError, match="3 actions"):
        problem.schedule((0, 0))
    with pytest.raises(ValueError, match=r"0\.\.15"):
        problem.schedule((0, 0, 16))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_observations_stay_in_their_ranges_and_tell_steps_apart(granularity):
    problem = Problem.build(menu_for(granularity), 0.6, granularity)
    least, most = (np.array([row[i] for row in OBSERVATION]) for i in (1, 2))
    for prefix in prefixes(problem):
        seen = problem.observation(prefix)
        assert seen.dtype == np.float32
        assert seen.shape == (len(OBSERVATION),)
        assert ((least <= seen) & (seen <= most)).all()
        assert seen[0] == np.float32(len(prefix) / problem.steps)
    firsts = [problem.observation((problem.middle,) * step) for step in range(problem.steps)]
    assert len({first.tobytes() for first in firsts}) == problem.steps


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_many_episodes_at_once_see_what_each_sees_alone(granularity):
    problem = Problem.build(menu_for(granularity), 0.5, granularity)
    many = np.random.default_rng(0).integers(0, problem.levels, (2, 10, problem.steps))
    for step in range(problem.steps + 1):
        seen, masks = problem.observation(many[..., :step]), problem.mask(many[..., :step])
        for index in np.ndindex(2, 10):
            assert np.array_equal(seen[index], problem.observation(many[index][:step].tolist()))
            assert np.array_equal(masks[index], problem.mask(many[index][:step].tolist()))


def test_the_budget_left_falls_to_what_dense_groups_leave():
    problem = Problem.build(toy_menu(), 0.6)
    menu = problem.menu
    room = problem.target_parameters - menu.smallest_parameters
    taken = sum(int(s.parameters[-1] - s.parameters[0]) for s in menu.sites if s.site.block == 0)
    assert problem.observation((problem.middle,))[7] == 1
    assert problem.observation((problem.dense_level,))[7] == pytest.approx((room - taken) / room)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_forecast_agrees_with_the_schedule_it_stands_for(granularity):
    problem = Problem.build(menu_for(granularity, 8), 0.5, granularity)
    episodes = np.array([prefix for prefix in prefixes(problem) if len(prefix) == problem.steps])
    forecast = problem.forecast(episodes)
    assert forecast.shape == episodes.shape
    exact = []
    for actions in episodes:
        schedule = problem.schedule(actions.tolist())
        cost = np.array([s.cost[s.choices.index(schedule[s.site.name])] for s in problem.menu.sites])
        exact.append(cost @ problem.membership)
    assert np.corrcoef(forecast.ravel(), np.ravel(exact))[0, 1] > 0.97
    assert forecast.sum() == pytest.approx(np.sum(exact), rel=0.1)
    assert problem.forecast_sites(episodes) @ problem.membership == pytest.approx(forecast)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(target_kept=0.0), r"\(0, 1\]"),
        (dict(target_kept=1.5), r"\(0, 1\]"),
        (dict(target_kept=float("nan")), r"\(0, 1\]"),
        (dict(target_kept=0.01), r"smallest options keep, 0\.0625; nearest: 0\.063"),
        (dict(granularity="layer"), "block, family"),
        (dict(levels=7), "nearest: 8"),
        (dict(reach=0.0), r"\(0, 3\)"),
    ],
)
def test_a_wrong_value_is_refused_with_the_rule(change, message):
    with pytest.raises(ValueError, match=message):
        Problem.build(**(dict(menu=toy_menu(), target_kept=0.5) | change))


def test_an_illegal_dense_becomes_the_highest_rung():
    problem = Problem.build(toy_menu(3), 0.4)
    every = np.full((1, 3), problem.levels - 1)
    first = problem.levels - 1 if problem.mask([])[-1] else problem.levels - 2
    wanted = [first, problem.levels - 2, problem.levels - 2]
    assert problem.legalise(every).tolist() == [wanted]
    assert every.min() == problem.levels - 1
    # One episode alone, and one that has not ended yet, are taken as well as many.
    assert problem.legalise(every[0]).tolist() == wanted
    assert problem.legalise(every[:, :2]).tolist() == [wanted[:2]]
    assert problem.legalise(every[:, :0]).tolist() == [[]]
