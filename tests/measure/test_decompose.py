"""Decompositions run on one thread each, and leave torch's threads as they were."""

from collections.abc import Iterator

import pytest
import torch

from rankopt import profile_model
from rankopt.measure.decompose import one_thread
from tests import tiny


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_tests_themselves_run_on_one_thread() -> None:
    assert torch.get_num_threads() == 1


def test_threads_are_given_back_even_after_an_error(two_threads: None) -> None:
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(RuntimeError, match="lapack"), one_thread():
        raise RuntimeError("lapack")
    assert torch.get_num_threads() == 2


def test_a_profile_has_the_same_curves_on_two_threads(two_threads: None) -> None:
    model = tiny.llama()
    batches = tiny.batches(model, count=1)
    on_two = profile_model(model, batches)
    torch.set_num_threads(1)
    on_one = profile_model(model, batches)
    for layer in on_one.info.layers:
        one, two = (p.loss_curve("kronecker", layer.name).losses for p in (on_one, on_two))
        assert two == pytest.approx(one, rel=1e-6)
