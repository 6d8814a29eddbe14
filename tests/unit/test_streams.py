import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.errors import DataError
from headstart.streams import derive_seed, prompt_order, shuffled, uniforms

KEY = (7, "rollout", 3)


def test_known_values_never_change() -> None:
    """Published runs are reproduced from their seed only while these bits stay what they are."""
    assert derive_seed(0, "dropout", 1, 2) == 2295216546004235673
    expected = [[0.599410908249941, 0.4426398079548116], [0.9787574095301548, 0.05319659141137212]]
    np.testing.assert_array_equal(uniforms(KEY, [(0, 0), (5, 1)], 0, 2), expected)
    assert shuffled(6, 0, 0) == [0, 4, 2, 3, 5, 1]


def test_seeds_keep_their_parts_apart() -> None:
    keys = [(0, "a", 1, 23), (0, "a", 12, 3), (0, "a1", 23), (0, "a", 123), (1, "a", 1, 23), (0, "b", 1, 23), (0, "a")]
    seeds = [derive_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(-1, "a", -5) != derive_seed(1, "a", 5)


@settings(max_examples=50)
@given(
    rollouts=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 63)), min_size=1, max_size=6),
    start=st.integers(0, 5000),
    count=st.integers(0, 9),
)
def test_a_draw_depends_on_its_own_key_alone(rollouts: list[tuple[int, int]], start: int, count: int) -> None:
    together = uniforms(KEY, rollouts, start, count)
    assert together.shape == (len(rollouts), count)
    assert together.dtype == np.float64
    for row, rollout in enumerate(rollouts):
        np.testing.assert_array_equal(together[row], uniforms(KEY, [rollout], 0, start + count)[0, start:])


def test_every_part_of_the_key_matters() -> None:
    base = uniforms(KEY, [(2, 1)], 0, 8)
    others = [((8, "rollout", 3), (2, 1)), ((7, "eval", 3), (2, 1)), ((7, "rollout", 4), (2, 1)), (KEY, (1, 2))]
    for key, rollout in [*others, (KEY, (3, 1)), (KEY, (2, 0))]:
        assert not np.isin(uniforms(key, [rollout], 0, 8), base).any()
    assert uniforms(KEY, [], 0, 8).shape == (0, 8)


def test_draws_are_uniform_and_unrelated_between_neighbours() -> None:
    draws = uniforms(KEY, [(p, s) for p in range(50) for s in range(4)], 0, 200)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, bins=64, range=(0, 1))[0]
    expected = draws.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * np.sqrt(2 * 63)
    noise = 5 / np.sqrt(draws.size)  # five standard errors of a correlation
    for a, b in [(draws[:-4], draws[4:]), (draws[:-1], draws[1:]), (draws[:, :-1], draws[:, 1:])]:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < noise
    assert len(np.unique(draws)) == draws.size


@given(n=st.integers(0, 60), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_shuffled_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert sorted(shuffled(n, seed, epoch)) == list(range(n))


def test_epochs_and_seeds_shuffle_differently() -> None:
    orders = [tuple(shuffled(30, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


@given(n=st.integers(1, 12), per_step=st.integers(1, 30), steps=st.integers(1, 6))
def test_steps_walk_the_epochs_without_gaps(n: int, per_step: int, steps: int) -> None:
    walked = [i for step in range(steps) for i in prompt_order(n, 5, step, per_step)]
    assert len(walked) == steps * per_step
    for epoch, start in enumerate(range(0, len(walked), n)):
        part = walked[start : start + n]
        assert part == shuffled(n, 5, epoch)[: len(part)]


def test_no_prompts_is_an_error() -> None:
    with pytest.raises(DataError, match="found 0"):
        prompt_order(0, 0, 0, 4)
