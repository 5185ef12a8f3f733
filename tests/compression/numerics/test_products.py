"""Products of numbers that were bfloat16 are as exact as in float32."""

from __future__ import annotations

import pytest
import torch

from compression.numerics.products import float32_product, products_of


def test_products_of_bfloat16_numbers_are_exact_and_sums_float32() -> None:
    rows = torch.randn(700, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = torch.backends.mkldnn.matmul.fp32_precision
    with products_of(rows.dtype):
        found = rows.float().T @ rows.float()
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), rows.double().T @ rows.double(), rtol=1e-5, atol=1e-3)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_other_numbers_are_multiplied_as_before() -> None:
    rows = torch.randn(700, 300, generator=torch.Generator().manual_seed(0))
    expected = rows.T @ rows
    with products_of(torch.float32):
        assert torch.equal(rows.T @ rows, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_product_of_16_bits_has_a_result_of_32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(size, 64, generator=generator).to(dtype) for size in (7, 9000))
    with torch.autocast("cpu", torch.bfloat16):
        found = float32_product(rows, weight)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), rows.double() @ weight.double().T, rtol=1e-5, atol=1e-4)
