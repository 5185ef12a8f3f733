"""What a pass of a healing leaves out, and what it puts back."""

from __future__ import annotations

from typing import Any

import torch

from compression.training.trainable import captured_head_input
from search.model.loading import load_model


def test_the_input_of_the_head_is_caught_without_a_product_with_the_vocabulary() -> None:
    model: Any = load_model("random:tiny-llama", "cpu").model
    head, ids = model.get_output_embeddings(), torch.arange(12).view(2, 6)
    expected = model(input_ids=ids).logits
    calls: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda module, args, output: calls.append(output))
    with captured_head_input(model) as caught:
        logits = model(input_ids=ids).logits
    hook.remove()
    assert [tuple(each.shape) for each in caught] == [(2, 6, head.in_features)]
    assert logits.shape == (1, 1, head.out_features)
    assert not logits.any()
    assert all(not output.any() for output in calls)
    assert torch.equal(torch.nn.functional.linear(caught[0], head.weight), expected)
    assert torch.equal(model(input_ids=ids).logits, expected)
