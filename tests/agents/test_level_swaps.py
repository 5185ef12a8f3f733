import numpy as np
import pytest

from agents.level_swaps import climb, legal, switched
from envs import Problem, toy_menu


def task(blocks=6, target=0.5):
    return Problem.build(toy_menu(blocks), target)


@pytest.mark.parametrize("most, reach", [(1, 1), (2, 3)])
def test_a_neighbour_is_a_few_switches_away_that_add_up_to_nothing(most, reach):
    problem = task()
    starts = np.full((200, problem.steps), problem.middle)
    near = switched(problem, starts, most, reach, np.random.default_rng(0))
    moved = near - starts
    assert (moved.sum(axis=1) == 0).all()
    assert np.abs(moved).max() <= most * reach
    assert ((moved != 0).sum(axis=1) <= 2 * most).all()
    assert (moved != 0).any(axis=1).mean() > 0.8
    assert (starts == problem.middle).all()


def test_neighbours_stay_on_the_ladder_and_dense_only_where_it_is_legal():
    problem = task(target=0.4)
    starts = np.tile(np.where(np.arange(6) % 2, problem.levels - 2, 0), (200, 1))
    near = switched(problem, starts, 3, 2, np.random.default_rng(0))
    assert near.min() >= 0
    assert (near == problem.levels - 1).any()
    for row in near.tolist():
        assert all(problem.mask(row[:step])[level] for step, level in enumerate(row))


def test_an_illegal_dense_becomes_the_highest_rung():
    problem = task(3, 0.4)
    every = np.full((1, 3), problem.levels - 1)
    first = problem.levels - 1 if problem.mask([])[-1] else problem.levels - 2
    assert legal(problem, every).tolist() == [[first, problem.levels - 2, problem.levels - 2]]
    assert every.min() == problem.levels - 1


def test_a_problem_of_one_step_has_neighbours():
    problem = task(1)
    near = switched(problem, np.full((50, 1), problem.middle), 2, 1, np.random.default_rng(0))
    assert len(np.unique(near)) > 1


def test_climbing_reaches_the_best_of_every_start():
    problem = task()
    goals = np.array([[9, 5, 8, 6, 7, 7], [4, 10, 7, 7, 6, 8]])

    def value(actions, origin):
        return -np.abs(actions - goals[origin]).sum(axis=1).astype(float)

    found = climb(problem, np.full((2, 6), 7), value, 40, 16, 2, 2, np.random.default_rng(0))
    assert (found == goals).all()
