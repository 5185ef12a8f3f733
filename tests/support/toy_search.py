"""Searches of toy problems by agents that learn from slopes."""

from __future__ import annotations

from agents import Gradient, Proposal, Reinforce
from envs import Problem, Reward, ToyEvaluator, toy_menu

REWARD = Reward(compression_weight=0.0, correct_weight=0.0)  # −KL


def problem(blocks: int = 3, target: float = 0.5, granularity: str = "block") -> Problem:
    """The problem of a toy model."""
    return Problem.build(toy_menu(blocks), target, granularity)


def search(agent: Reinforce | Gradient, evaluate: ToyEvaluator) -> list[tuple[Proposal, float]]:
    """Run an agent to the end of its budget; returns its proposals with their rewards."""
    told = []
    while proposals := agent.ask(1):
        (proposal,) = proposals
        reward = REWARD(evaluate([proposal.schedule])[0])
        if proposal.probe is not None:
            agent.tell_slopes(proposal, evaluate.slopes(proposal.schedule, proposal.probe))
        agent.tell([proposal], [reward])
        told.append((proposal, reward))
    return told
