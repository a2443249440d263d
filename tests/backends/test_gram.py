"""Symmetric sums are the plain ones."""

import pytest
import torch

from rankopt.backends.gram import SymmetricSum, gram, symmetric_numel


@pytest.mark.parametrize("size", [3, 191, 192, 1000])
def test_a_symmetric_sum_is_the_plain_sum_whatever_its_blocks(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    parts = [torch.randn(5, size, generator=generator, dtype=torch.float64) for _ in range(2)]
    total = SymmetricSum(size, torch.device("cpu"))
    for part in parts:
        total.add(part)
    whole = torch.cat(parts)
    assert torch.allclose(total.full(), whole.T @ whole, rtol=0, atol=1e-12)
    assert torch.equal(total.full(), total.full().T)
    assert torch.equal(gram(whole), gram(whole).T)
    assert torch.allclose(gram(whole), total.full(), rtol=0, atol=1e-12)
    kept = sum(strip.numel() for strip in total.strips)
    assert kept == symmetric_numel(size) <= size**2
