"""Trains PPO from stable-baselines3 on BondDimensionEnv and keeps all scores in a file for later runs.

    python -m examples.train_ppo                   # half a minute; a second run reuses all scores
    python -m examples.train_ppo --episodes 120    # a few seconds
    python -m examples.train_ppo --slopes          # the observation holds what slopes have taught

The scores come from a toy problem of a few blocks, so no model is needed. For your own model, pass its menu to
`Problem.build` and a callable that turns schedules into scores to `ScoreTable`; nothing else changes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gymnasium as gym
from stable_baselines3 import PPO

import envs  # noqa: F401 - registers the environment
from agents.critic_features import CriticFeatures
from envs import Problem, Reward, ScoreTable, ToyEvaluator, toy_menu


def main(words: list[str] | None = None) -> None:
    """Trains the policy, then compares its schedule with the closed form."""
    parser = argparse.ArgumentParser(description="Train PPO on the search for bond dimensions.")
    parser.add_argument("--episodes", type=int, default=3000, help="Training episodes; each costs one evaluation.")
    parser.add_argument("--blocks", type=int, default=6, help="Number of blocks in the toy problem.")
    parser.add_argument("--table", type=Path, default=Path("scores.json"), help="File that keeps the scores.")
    parser.add_argument("--slopes", action="store_true", help="Add what slopes have taught to the observation.")
    given = parser.parse_args(words)

    menu = toy_menu(given.blocks)
    problem = Problem.build(menu, target_kept=0.5)
    evaluator = ToyEvaluator(menu)
    table = ScoreTable(evaluator, given.table)
    # With one_shot=True an episode is a single step, so PPO need not assign credit over steps; drop it to get one step
    # per block.
    how = {"problem": problem, "evaluate": table, "reward": Reward(), "one_shot": True}
    env: gym.Env[Any, Any] = gym.make(
        "chisel/BondDimension-v0", **how, slopes=evaluator.slopes if given.slopes else None
    )
    if given.slopes:
        env = CriticFeatures(env)

    model = PPO("MlpPolicy", env, n_steps=60, batch_size=60, learning_rate=2e-3, seed=0, device="cpu")
    model.learn(given.episodes)

    observation, _ = env.reset()
    action, _ = model.predict(observation, deterministic=True)
    *_, info = env.step(action)
    [closed_form] = table([problem.closed_form()])
    table.save()
    print(f"closed form KL {closed_form.kl:.4f}, policy KL {info['score'].kl:.4f}")
    print(f"{table.measured} schedules newly measured, {len(table)} in {given.table}")


if __name__ == "__main__":
    main()
