"""Policies on disk: what is saved is continued, also elsewhere on the same model, and anything else is refused."""

import hashlib
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy

import agents
from agents import AgentContext, SavedPolicy
from envs import Problem, Reward, ToyEvaluator, toy_menu

REWARD = Reward()
LEARNERS = ["ppo", "ppo-masked", "reinforce"]
every_learner = pytest.mark.parametrize("name", LEARNERS)


def toy(target=0.5, blocks=4, granularity="block+family", levels=16):
    return Problem.build(toy_menu(blocks), target, granularity, levels)


def trained(name, task, budget=40, **context):
    agent = agents.make(name, task, AgentContext(0, budget, model="model a", **context))
    evaluate = ToyEvaluator(task.menu, (1.6, 0.5, 1.0, 2.0), 0.1)
    while proposals := agent.ask(10):
        for one in proposals:
            if one.probe is not None:
                agent.tell_slopes(one, evaluate.slopes(one.schedule, one.probe))
        agent.tell(proposals, [REWARD(score) for score in evaluate([each.schedule for each in proposals])])
    return agent


@pytest.fixture(scope="module", params=LEARNERS)
def saved(request, tmp_path_factory):
    """A trained agent, and the folder its policy is in."""
    folder = tmp_path_factory.mktemp("policy")
    agent = trained(request.param, toy())
    agent.saved_policy().write(folder)
    return agent, folder


def test_what_is_read_is_what_was_written(saved):
    agent, folder = saved
    before, after = agent.saved_policy(), SavedPolicy.read(folder)
    for field in ("agent", "model", "target_kept", "steps", "rungs", "settings"):
        assert getattr(after, field) == getattr(before, field)
    assert after.arrays.keys() == before.arrays.keys()
    assert all(np.array_equal(after.arrays[name], before.arrays[name]) for name in before.arrays)
    assert sorted(path.name for path in folder.iterdir()) == ["policy.json", "policy.safetensors"]


def test_a_continued_policy_starts_where_the_other_ended(saved):
    agent, folder = saved
    start = SavedPolicy.read(folder)
    again = agents.make(agent.name, toy(), AgentContext(7, 10, model="model a", policy=start))
    first = again.ask(1)[0].schedule
    assert first != toy().closed_form()
    assert first in [proposal.schedule for proposal in agent.recommend(2)]  # behind the mean of earlier modes
    assert all(np.array_equal(array, start.arrays[name]) for name, array in again.saved_policy().arrays.items())


@every_learner
@pytest.mark.slow
def test_what_was_learned_at_one_target_helps_at_another(name):
    start = trained(name, toy(0.5), 80).saved_policy()
    task = toy(0.7)
    evaluate = ToyEvaluator(task.menu, (1.6, 0.5, 1.0, 2.0), 0.1)
    [first] = agents.make(name, task, AgentContext(0, 10, model="model a", policy=start)).ask(1)
    learned, closed_form = evaluate([first.schedule, task.closed_form()])
    assert learned.kl < 0.95 * closed_form.kl


@pytest.mark.slow
def test_another_model_other_steps_and_another_ladder_are_refused(saved):
    agent, folder = saved
    start = SavedPolicy.read(folder)
    other = next(name for name in LEARNERS if name != agent.name)
    for name, task, model, message in (
        (agent.name, toy(), "model b", "learned on another model: model a, not model b as in this run"),
        (other, toy(), "model a", f"learned by agent {agent.name} and cannot be continued by {other}"),
        (
            agent.name,
            toy(blocks=5),
            "model a",
            "other steps, 6, not 7 as in this run: step 4 .* family_attention .* block_04",
        ),
        (agent.name, toy(granularity="block"), "model a", "step 4 .* family_attention in the policy and about none in"),
        (agent.name, toy(levels=8), "model a", "another ladder: 15 rungs from -1.4 to 1.4, not 7 rungs"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            agents.make(name, task, AgentContext(0, 5, model=model, policy=start))
        assert "\n" not in str(refused.value)
    for arrays in (
        {**start.arrays, "more": np.zeros(2)},
        {name: array[..., None] for name, array in start.arrays.items()},
    ):
        with pytest.raises(ValueError, match="the policy does not fit: its array"):
            agents.make(agent.name, toy(), AgentContext(0, 5, model="model a", policy=replace(start, arrays=arrays)))


class Danger:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def cut(folder):
    path = folder / "policy.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def change(**fields):
    def edit(folder):
        path = folder / "policy.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return edit


def nan(folder):
    start = SavedPolicy.read(folder)
    replace(start, arrays={name: np.full_like(array, np.nan) for name, array in start.arrays.items()}).write(folder)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (cut, "policy.safetensors is truncated"),
        (lambda folder: (folder / "policy.safetensors").unlink(), "policy.safetensors: No such file"),
        (lambda folder: (folder / "policy.json").unlink(), "policy.json: No such file"),
        (lambda folder: (folder / "policy.json").write_text('{"format": 1'), "delimiter"),
        (lambda folder: (folder / "policy.json").write_text("[" * 100_000), "policy.json"),
        (lambda folder: (folder / "policy.json").write_bytes(b"\xff\xfe"), "codec"),
        (
            lambda folder: (folder / "policy.json").write_text('{"format": 1, "format": 1}'),
            "the key 'format' occurs twice",
        ),
        (lambda folder: (folder / "policy.json").write_text('{"format": NaN}'), "NaN is not allowed"),
        (lambda folder: (folder / "policy.json").write_text(" " * (1 << 20) + "{}"), "larger than"),
        (lambda folder: (folder / "policy.json").write_bytes(pickle.dumps(Danger())), "codec"),
        (lambda folder: (folder / "policy.safetensors").write_bytes(pickle.dumps(Danger())), "is truncated or does"),
        (change(format=2), "not a policy of format 1"),
        (change(extra=1), "not a policy of format 1"),
        (change(steps="block_00"), "a field of the wrong type"),
        (change(rungs=[True]), "a field of the wrong type"),
        (change(subject=None), "a field of the wrong type"),
        (nan, "does not hold finite floating-point numbers only"),
    ],
)
def test_a_folder_that_holds_no_whole_policy_is_refused_in_one_line(spoil, words, tmp_path):
    agents.make("reinforce", toy(), AgentContext(0, 5)).saved_policy().write(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError) as refused:
        SavedPolicy.read(tmp_path)
    assert str(refused.value).startswith(
        "policy must be a folder with policy.json and policy.safetensors of a run, got"
    )
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "model.zip").write_bytes(pickle.dumps(Danger()))
    with pytest.raises(ValueError, match="Not a directory"):
        SavedPolicy.read(tmp_path / "model.zip")


def test_arrays_with_an_endless_header_are_refused_before_it_is_parsed(tmp_path, monkeypatch):
    content = (1 << 21).to_bytes(8, "little") + b" " * (1 << 21)
    description = {"format": 1, "agent": "ppo", "subject": "m", "target_kept": 0.5, "steps": [], "rungs": []}
    description |= {"settings": {}, "arrays_sha256": hashlib.sha256(content).hexdigest()}
    (tmp_path / "policy.json").write_text(json.dumps(description))
    (tmp_path / "policy.safetensors").write_bytes(content)
    monkeypatch.setattr(safetensors.numpy, "load", lambda content: pytest.fail("it was parsed"))
    with pytest.raises(ValueError, match=r"policy\.safetensors has a header of more than 1048576 bytes"):
        SavedPolicy.read(tmp_path)
