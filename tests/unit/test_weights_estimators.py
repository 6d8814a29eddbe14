import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headstart.losses.selection import loss_weights
from headstart.stats import mean_interval, paired_difference, percentiles, wilson

LENGTHS = [2, 5, 1, 4]
VALUES = [[0.5, 1.5], [1.0, 2.0, 3.0, 4.0, 5.0], [7.0], [0.25, 0.5, 0.75, 1.0]]


def rows_of(lengths: list[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def loss_of(denominator: str, size: int) -> float:
    """The loss summed over micro-batches of `size` rollouts."""
    total = 0.0
    for start in range(0, len(LENGTHS), size):
        lengths, values = LENGTHS[start : start + size], VALUES[start : start + size]
        weights = loss_weights(rows_of(lengths), len(lengths), denominator, total_tokens=12, total_rollouts=4)  # type: ignore[arg-type]
        assert weights.dtype == torch.float32
        total += float((weights.double() * torch.tensor([v for row in values for v in row]).double()).sum())
    return total


@pytest.mark.parametrize(
    ("denominator", "expected"),
    [
        ("trajectory", sum(sum(v) / len(v) for v in VALUES) / 4),
        ("token", sum(map(sum, VALUES)) / 12),
        ("sum", sum(map(sum, VALUES)) / 4),
    ],
)
def test_weights_give_the_global_loss_however_it_is_split(denominator: str, expected: float) -> None:
    for size in (1, 2, 3, 4):
        assert loss_of(denominator, size) == pytest.approx(expected, rel=1e-6)


def test_a_rank_without_tokens_gets_no_weights() -> None:
    for denominator in ("trajectory", "token", "sum"):
        weights = loss_weights(torch.zeros(0, dtype=torch.int64), 0, denominator, total_tokens=0, total_rollouts=0)
        assert weights.shape == (0,)


def test_wilson_known_values() -> None:
    # Newcombe (1998), Statistics in Medicine 17:857, table I: 81/263 and 0/20 and 15/148.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


@given(n=st.integers(1, 500), share=st.floats(0, 1))
def test_wilson_contains_its_share_and_mirrors(n: int, share: float) -> None:
    low, high = wilson(share * n, n)
    assert -1e-12 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1 + 1e-12
    mirrored = wilson((1 - share) * n, n)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-9)


def test_mean_interval_is_wilson_for_single_samples_and_never_empty() -> None:
    assert mean_interval([1.0, 0.0, 0.0, 1.0, 1.0]) == pytest.approx(wilson(3, 5))
    assert mean_interval([1.0] * 10) == pytest.approx(wilson(10, 10))
    low, high = mean_interval([1.0])
    assert low < 0.5
    assert high == 1.0
    assert mean_interval([]) == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"found 0.5 to 3.0"):
        mean_interval([0.5, 3.0])


def test_mean_interval_nears_the_normal_one_and_narrows_with_averaging() -> None:
    values = [0.25, 0.5, 0.75, 0.5] * 100
    low, high = mean_interval(values)
    half = 1.96 * math.sqrt(sum((v - 0.5) ** 2 for v in values) / 399 / 400)
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=2e-4)
    wide = mean_interval([0.0, 1.0] * 200)
    assert high - low < 0.5 * (wide[1] - wide[0])


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=1, max_size=50))
def test_mean_interval_stays_in_bounds_around_the_mean(values: list[float]) -> None:
    low, high = mean_interval(values)
    mean = sum(values) / len(values)
    assert 0 <= low <= mean + 1e-12
    assert mean - 1e-12 <= high <= 1
    assert high > low


def test_paired_difference() -> None:
    a, b = [1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]
    mean, (low, high) = paired_difference(a, b)
    assert mean == 0.5
    half = 1.96 * math.sqrt((4 * 0.25 / 3) / 4)
    assert (low, high) == pytest.approx((0.5 - half, 1.0))
    swapped = paired_difference(b, a)
    assert swapped[0] == -mean
    assert swapped[1] == pytest.approx((-high, -low))
    assert paired_difference([0.5] * 30, [0.5] * 30) == (0.0, pytest.approx((-0.1, 0.1)))
    assert paired_difference([1.0], [0.0])[1] == (-1.0, 1.0)
    with pytest.raises(ValueError, match="found 1 and 2"):
        paired_difference([1.0], [1.0, 0.0])


def test_percentiles() -> None:
    assert percentiles([4.0, 1.0, 3.0, 2.0, 5.0], [0, 50, 90, 100]) == pytest.approx([1.0, 3.0, 4.6, 5.0])
    assert all(math.isnan(q) for q in percentiles([], [5, 50]))
