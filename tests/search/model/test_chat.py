"""What a tokenizer, a chat template or the positions of a model cannot do is one line, or ends the answer."""

from __future__ import annotations

import pytest
from tiny_gpt2 import tiny_gpt2

from compression.refusal import Refusal
from search.model.chat import Chat


def say(piece: str) -> None:
    """Throw a piece of an answer away."""


@pytest.mark.parametrize("ends", [True, False])
def test_an_answer_ends_at_the_last_position(ends: bool) -> None:
    assert Chat(tiny_gpt2(ends=ends), tokens=100).answer("Hello", say)


@pytest.mark.parametrize("length", [32, 1000])
def test_a_prompt_that_fills_the_positions_is_refused(length: int) -> None:
    with pytest.raises(Refusal, match=f"the model's 32 positions, but has {length} tokens"):
        Chat(tiny_gpt2()).answer("x" * length, say)


def test_a_prompt_of_another_encoding_is_refused() -> None:
    with pytest.raises(Refusal, match="prompt must be text"):
        Chat(tiny_gpt2()).answer("n\udcff", say)


def test_a_token_without_an_embedding_is_refused_by_name() -> None:
    small = tiny_gpt2(rows=100)
    assert len(small.encode("AB")) == 2
    with pytest.raises(Refusal, match=r"embeddings for 100 tokens, but its tokenizer makes token \d+ \("):
        small.encode("täglich")
    with pytest.raises(Refusal, match="embeddings for 100 tokens"):
        Chat(small).answer("täglich", say)


@pytest.mark.parametrize("template", ["{{ raise_exception('no system role') }}", "{{ nothing.at.all }}", "{% oops %}"])
def test_a_chat_template_that_raises_is_named(template: str) -> None:
    model = tiny_gpt2()
    model.tokenizer.chat_template = template
    with pytest.raises(Refusal, match="the model's chat template refuses a conversation of user: "):
        Chat(model).answer("Hello", say)
