"""Groups of options: what is refused, what is copied, and choices that groups share."""

import numpy as np
import pytest

from rankopt_solvers import Group, ProblemError, shared_choice


def group(name: str, cost: list[int], loss: list[float]) -> Group:
    return Group(name, np.array(cost), np.array(loss))


@pytest.mark.parametrize(
    ("cost", "loss"),
    [
        ([1, 2], [1.0, np.nan]),
        ([1, 2], [np.inf, 0.0]),
        ([1, 2], [1.0, -1.0]),
        ([1, 2], ["one", "none"]),
        ([1, -2], [1.0, 0.0]),
        ([1.5, 2], [1.0, 0.0]),
        ([np.nan, 2], [1.0, 0.0]),
        ([np.inf, 2], [1.0, 0.0]),
        ([2.0**60, 2], [1.0, 0.0]),
        ([2**64 - 1, 2], [1.0, 0.0]),
        ([2**70, 2], [1.0, 0.0]),
        (["one", "two"], [1.0, 0.0]),
        ([None, 2], [1.0, 0.0]),
        ([1, 2], [1.0]),
        ([[1, 2]], [[1.0, 0.0]]),
        (3, 1.0),
        ([], []),
    ],
)
def test_a_malformed_group_is_refused_by_name(cost: object, loss: object) -> None:
    with pytest.raises(ProblemError, match=r"block\.7\.mlp"):
        Group("block.7.mlp", np.array(cost), np.array(loss))


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.uint64, np.float32, np.float64])
def test_whole_numbers_of_any_kind_are_costs(dtype: type) -> None:
    made = Group("a", np.array([3, 5], dtype=dtype), np.array([1, 0]))  # type: ignore[arg-type]
    assert made.cost.dtype == np.int64 and made.cost.tolist() == [3, 5]
    assert made.loss.dtype == np.float64 and made.loss.tolist() == [1.0, 0.0]


def test_lists_are_taken() -> None:
    made = Group("a", [3, 5], [1, 0])  # type: ignore[arg-type]
    assert made.cost.tolist() == [3, 5] and made.loss.tolist() == [1.0, 0.0]


def test_writable_arrays_are_copied() -> None:
    cost, loss = np.array([1, 2, 3, 4]), np.array([1.0, 0.5, 0.2, 0.0])
    whole, part = Group("a", cost, loss), Group("b", cost[::2], loss[1::2])
    cost[:], loss[:] = 99, 99.0
    assert whole.cost.tolist() == [1, 2, 3, 4] and whole.loss.tolist() == [1.0, 0.5, 0.2, 0.0]
    assert part.cost.tolist() == [1, 3] and part.loss.tolist() == [0.5, 0.0]
    assert cost.flags.writeable and loss.flags.writeable
    for array in (whole.cost, whole.loss, part.cost, part.loss):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 7


def test_read_only_arrays_are_not_copied() -> None:
    cost, loss = np.arange(1000), np.arange(1000, 0, -1).astype(float)
    cost.flags.writeable = loss.flags.writeable = False
    made = Group("a", cost, loss)
    assert made.cost is cost and made.loss is loss
    again = Group("b", made.cost, made.loss)
    assert again.cost is cost and again.loss is loss


def test_a_read_only_view_of_a_writable_array_is_copied() -> None:
    cost, loss = np.array([1, 2]), np.array([1.0, 0.0])
    views = cost[:], loss[:]
    for view in views:
        view.flags.writeable = False
    made = Group("a", *views)
    cost[0], loss[0] = 99, 99.0
    assert made.cost.tolist() == [1, 2] and made.loss.tolist() == [1.0, 0.0]


# Shared choices


def test_a_shared_choice_adds_up_costs_and_losses() -> None:
    parts = [group("q", [1, 5], [3.0, 0.0]), group("k", [2, 4], [1.0, 0.5])]
    both = shared_choice("attention", parts)
    assert both.name == "attention"
    assert both.cost.tolist() == [3, 9] and both.loss.tolist() == [4.0, 0.5]
    alone = shared_choice("q alone", parts[:1])
    assert alone.cost.tolist() == [1, 5] and alone.loss.tolist() == [3.0, 0.0]


@pytest.mark.parametrize("names", [("q", "k"), ("q", "q")])
@pytest.mark.parametrize("other", [1, 3])
def test_different_numbers_of_options_cannot_be_shared(names: tuple[str, str], other: int) -> None:
    parts = [
        group(names[0], [1, 5], [3.0, 0.0]),
        Group(names[1], np.arange(other), np.zeros(other)),
    ]
    with pytest.raises(ProblemError, match=r"'attention'.*equally many options.*2"):
        shared_choice("attention", parts)


def test_no_groups_share_no_choice() -> None:
    with pytest.raises(ProblemError, match="'attention'"):
        shared_choice("attention", [])


@pytest.mark.parametrize("number", [2, 3, 4, 5])
def test_costs_too_large_to_be_added_are_refused(number: int) -> None:
    # Four times 2**62 is 0 in 64 bits.
    parts = [group(f"g{i}", [2**62, 0], [0.0, 1.0]) for i in range(number)]
    with pytest.raises(ProblemError, match=r"2\*\*62"):
        shared_choice("all", parts)
