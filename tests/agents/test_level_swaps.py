import numpy as np
import pytest

from agents.level_swaps import climb, swapped
from envs import Problem, toy_menu


def task(blocks=6, target=0.5):
    return Problem.build(toy_menu(blocks), target)


@pytest.mark.parametrize("most, reach", [(1, 1), (2, 3)])
def test_a_neighbour_is_a_few_switches_away_that_add_up_to_nothing(most, reach):
    problem = task()
    starts = np.full((200, problem.steps), problem.middle)
    near = swapped(problem, starts, most, reach, np.random.default_rng(0))
    moved = near - starts
    assert (moved.sum(axis=1) == 0).all()
    assert np.abs(moved).max() <= most * reach
    assert ((moved != 0).sum(axis=1) <= 2 * most).all()
    assert (moved != 0).any(axis=1).mean() > 0.8
    assert (starts == problem.middle).all()


def test_neighbours_stay_on_the_ladder_and_dense_only_where_it_is_legal():
    problem = task(target=0.4)
    starts = np.tile(np.where(np.arange(6) % 2, problem.levels - 2, 0), (200, 1))
    near = swapped(problem, starts, 3, 2, np.random.default_rng(0))
    assert near.min() >= 0
    assert (near == problem.levels - 1).any()
    for row in near.tolist():
        assert all(problem.mask(row[:step])[level] for step, level in enumerate(row))


def test_a_problem_of_one_step_has_neighbours():
    problem = task(1)
    near = swapped(problem, np.full((50, 1), problem.middle), 2, 1, np.random.default_rng(0))
    assert len(np.unique(near)) > 1


def test_climbing_reaches_the_best_of_every_start():
    problem = task()
    goals = np.array([[9, 5, 8, 6, 7, 7], [4, 10, 7, 7, 6, 8]])

    def value(actions, origin):
        return -np.abs(actions - goals[origin]).sum(axis=1).astype(float)

    found = climb(problem, np.full((2, 6), 7), value, 40, 16, 2, 2, np.random.default_rng(0))
    assert (found == goals).all()
