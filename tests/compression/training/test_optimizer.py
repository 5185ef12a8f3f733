"""The optimizer of healing: RMSprop whose mean squares are factored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compression.training.optimizer import FactoredRMSprop


def stepped(parameter: nn.Parameter, gradients: list[torch.Tensor], rate: float = 0.1) -> FactoredRMSprop:
    optimizer = FactoredRMSprop([{"params": [parameter], "lr": rate}], decay=0.9)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return optimizer


def noise(*shape: int, count: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def test_a_vector_takes_the_steps_of_rmsprop_corrected_for_its_start() -> None:
    parameter, gradients = nn.Parameter(torch.zeros(7)), noise(7)
    stepped(parameter, gradients)
    wanted, mean = torch.zeros(7), torch.zeros(7)
    for number, gradient in enumerate(gradients, 1):
        mean = 0.9 * mean + 0.1 * gradient.square()
        wanted -= 0.1 * gradient / (mean / (1 - 0.9**number)).sqrt()
    torch.testing.assert_close(parameter.detach(), wanted)


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5, 1), (1, 6, 1, 5)])
def test_squares_that_are_a_product_of_rows_and_columns_give_the_steps_of_whole_squares(shape: tuple[int, ...]) -> None:
    rows, columns = torch.rand(6, 1) + 0.1, torch.rand(1, 5) * 100 + 0.1
    gradients = [(rows * columns).sqrt().reshape(shape) * sign for sign in (1.0, -2.0, 3.0)]
    parameter, whole = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(30))
    optimizer = stepped(parameter, gradients)
    stepped(whole, [gradient.flatten() for gradient in gradients])
    torch.testing.assert_close(parameter.detach().flatten(), whole.detach())
    held = sum(tensor.numel() for tensor in optimizer.state[parameter].values())
    assert held == 1 + 6 + 5


def test_entries_without_gradients_stay_and_parameters_without_one_are_left_out() -> None:
    parameter, other = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(2))
    gradient = torch.zeros(4, 4)
    gradient[1, 2] = 3.0
    optimizer = FactoredRMSprop([{"params": [parameter, other], "lr": 0.5}])
    parameter.grad = gradient.clone()
    optimizer.step()
    wanted = torch.ones(4, 4)
    wanted[1, 2] = 0.5
    torch.testing.assert_close(parameter.detach(), wanted)
    assert torch.equal(other.detach(), torch.ones(2))
    parameter.grad = torch.zeros(4, 4)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), wanted)
