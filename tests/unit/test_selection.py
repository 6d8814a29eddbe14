"""Token selection: each rule against a brute force written from its definition, and what it does to a training step."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headstart.config.schema import AllTokens, FormatTokens, PlacedTokens, Selection, TopTokens
from headstart.errors import ConfigError
from headstart.losses.selection import CLASSES, Selector, chosen, loss_weights, token_class
from headstart.records import Prompt, Rollout
from headstart.train.metrics import Clock
from headstart.train.parts import Parts
from headstart.train.step import backward, sample_rollouts, train_step
from support import make_config, make_parts

LENGTHS = (5, 1, 9, 4)
ROLLOUTS = [Rollout(Prompt(i, str(i), (3,), (3,)), i % 2, tuple(range(n)), False) for i, n in enumerate(LENGTHS)]
SIGNALS = ("divergence", "student_entropy", "teacher_entropy")
RULES: tuple[Selection, ...] = (
    *(PlacedTokens(type=kind, tokens=3) for kind in ("first", "last", "middle", "random", "window")),  # type: ignore[arg-type]
    TopTokens(by=("divergence",), tokens=3),
    TopTokens(by=("divergence", "student_entropy", "teacher_entropy"), tokens=3),
    FormatTokens(classes=("number", "stop")),
    FormatTokens(classes=("word", "symbol"), tokens=1),
)
CLASS_V = np.arange(9) % len(CLASSES)


def signals(seed: int = 0) -> dict[str, torch.Tensor]:
    draws = np.random.default_rng(seed)
    return {name: torch.from_numpy(draws.random(sum(LENGTHS)).astype(np.float32)) for name in SIGNALS}


def pick(rule: Selection, length: int, uniform: list[float] | None = None, **signals: list[float]) -> list[int]:
    draws = np.array(uniform or [0.5] * length)
    mask = chosen(rule, draws, {name: np.array(values) for name, values in signals.items()}, CLASS_V[:length])
    assert mask.shape == (length,)
    assert mask.dtype == bool
    return [int(place) for place in mask.nonzero()[0]]


@given(length=st.integers(0, 12), k=st.integers(1, 14), data=st.data())
def test_every_rule_against_a_brute_force(length: int, k: int, data: st.DataObject) -> None:
    reals = st.lists(st.floats(0, 1, exclude_max=True), min_size=length, max_size=length)
    u, a, b = data.draw(reals), data.draw(reals), data.draw(reals)
    size = min(k, length)
    assert pick(PlacedTokens(type="first", tokens=k), length, u) == list(range(length))[:k]
    assert pick(PlacedTokens(type="last", tokens=k), length, u) == list(range(length))[-k:]
    middle = pick(PlacedTokens(type="middle", tokens=k), length, u)
    assert len(middle) == size
    if middle:
        before, after = middle[0], length - 1 - middle[-1]
        assert 0 <= after - before <= 1
        assert middle == list(range(middle[0], middle[-1] + 1))
    random = pick(PlacedTokens(type="random", tokens=k), length, u)
    assert random == sorted(sorted(range(length), key=lambda i: (u[i], i))[:k])
    window = pick(PlacedTokens(type="window", tokens=k), length, u)
    assert window == [i + (math.floor(u[0] * (length - size + 1)) if length else 0) for i in range(size)]
    top = pick(TopTokens(by=("divergence", "teacher_entropy"), tokens=k), length, u, divergence=a, teacher_entropy=b)
    assert top == sorted(sorted(range(length), key=lambda i: (-a[i] * b[i], i))[:k])
    assert pick(FormatTokens(classes=("word", "stop")), min(length, 9)) == [
        i for i in range(min(length, 9)) if CLASSES[i % 5] in ("word", "stop")
    ]
    members = [i for i in range(min(length, 9)) if CLASSES[i % 5] in ("word", "stop")]
    some = pick(FormatTokens(classes=("word", "stop"), tokens=k), min(length, 9), u[:9])
    assert some == sorted(sorted(members, key=lambda i: (u[i], i))[:k])
    assert pick(AllTokens(), length) == list(range(length))


def test_random_rules_cover_every_token_evenly() -> None:
    length, k, rounds = 8, 3, 4000
    prompts = [Rollout(Prompt(i, "", (0,), (0,)), 0, tuple(range(length)), False) for i in range(rounds)]
    none = {name: torch.zeros(length * rounds) for name in SIGNALS}
    for kind in ("random", "window"):
        mask = Selector(PlacedTokens(type=kind, tokens=k)).mask(prompts, 0, none)  # type: ignore[arg-type]
        assert mask is not None
        share = mask.reshape(rounds, length).double().mean(0)
        starts = np.array([min(i + 1, k, length - i, length - k + 1) for i in range(length)]) / (length - k + 1)
        expected = np.full(length, k / length) if kind == "random" else starts
        assert share.numpy() == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("rule", RULES)
def test_neither_micro_batches_nor_their_order_change_the_choice(rule: Selection) -> None:
    selector = Selector(rule, seed=3, class_V=CLASS_V)
    found = signals()
    parts = {name: signal.split(LENGTHS) for name, signal in found.items()}
    whole = selector.mask(ROLLOUTS, 7, found)
    assert whole is not None
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        for size in (1, 2, 3):
            for start in range(0, 4, size):
                places = order[start : start + size]
                own = {name: torch.cat([split[p] for p in places]) for name, split in parts.items()}
                alone = selector.mask([ROLLOUTS[p] for p in places], 7, own)
                assert alone is not None
                assert torch.equal(alone, torch.cat([whole.split(LENGTHS)[p] for p in places]))
    assert selector.counts(ROLLOUTS) == [int(part.sum()) for part in whole.split(LENGTHS)]
    assert selector.mask([], 7, {name: torch.zeros(0) for name in SIGNALS}).shape == (0,)  # type: ignore[union-attr]


def test_draws_change_with_step_and_seed_only_where_the_rule_draws() -> None:
    for rule in RULES:
        drawn = getattr(rule, "type", "") in ("random", "window") or getattr(rule, "tokens", None) == 1
        masks = [
            Selector(rule, seed, CLASS_V).mask(ROLLOUTS, step, signals()) for seed, step in ((0, 0), (0, 1), (1, 0))
        ]
        changed = [not torch.equal(masks[0], other) for other in masks[1:]]  # type: ignore[arg-type]
        assert changed == [drawn, drawn]


@pytest.mark.parametrize("denominator", ["trajectory", "token", "sum"])
def test_the_loss_is_a_mean_over_the_selected_tokens(denominator: str) -> None:
    """Brute force in float64; the second rollout has no selected token and still counts as a rollout."""
    values = torch.rand(sum(LENGTHS), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    masks = [[True, False, True, False, False], [False], [True] * 9, [False, True, False, False]]
    mask = torch.tensor([m for row in masks for m in row])
    kept = [v[torch.tensor(m)] for v, m in zip(values.split(LENGTHS), masks, strict=True)]
    total = sum(len(v) for v in kept)
    expected = {
        "trajectory": sum(float(v.mean()) for v in kept if len(v)) / 4,
        "token": sum(float(v.sum()) for v in kept) / total,
        "sum": sum(float(v.sum()) for v in kept) / 4,
    }[denominator]
    row = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    weights = loss_weights(row, 4, denominator, total_tokens=total, total_rollouts=4, selected_M=mask)  # type: ignore[arg-type]
    assert weights.dtype == torch.float32
    assert (weights[~mask] == 0).all()
    assert float((weights.double() * values).sum()) == pytest.approx(expected, rel=1e-6)
    every = torch.ones_like(mask)
    plain = loss_weights(row, 4, denominator, total_tokens=len(mask), total_rollouts=4)  # type: ignore[arg-type]
    same = loss_weights(row, 4, denominator, total_tokens=len(mask), total_rollouts=4, selected_M=every)  # type: ignore[arg-type]
    assert torch.equal(plain, same)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("12", "number"), (" 3.5", "number"), ("x3", "word"), (" the", "word"), ("é", "word"), ("字", "word"),
     ("+", "symbol"), ("\\(", "symbol"), ("\ufffd", "symbol"), (" \n", "space"), ("", "space"), ("²", "number")],
)  # fmt: skip
def test_token_classes(text: str, expected: str) -> None:
    assert token_class(text) == expected


# --- in a training step ----------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return make_parts(tmp_path / "run", make_config(tmp_path, "horizon.tokens=12"))


def gradient(parts: Parts, rollouts: list[Rollout], rule: Selection | None = None) -> torch.Tensor:
    selector = parts.selector if rule is None else Selector(rule, 0, parts.selector.class_V)
    parts.optimizer.zero_grad(set_to_none=True)
    backward(replace(parts, selector=selector), rollouts, 0, Clock(parts.runtime))
    return torch.cat([p.grad.flatten().clone() for p in parts.student.trainable().values() if p.grad is not None])


def with_training(parts: Parts, **training: object) -> Parts:
    config = parts.config.model_copy(update={"training": parts.config.training.model_copy(update=training)})
    return replace(parts, config=config)


@pytest.mark.parametrize("denominator", ["trajectory", "token", "sum"])
def test_cut_equals_mask(parts: Parts, denominator: str) -> None:
    """The first 5 tokens of long rollouts give the gradient of the same rollouts sampled with horizon 5."""
    parts = with_training(parts, denominator=denominator)
    long, short = sample_rollouts(parts, 0, 12), sample_rollouts(parts, 0, 5)
    assert sum(len(r.completion_ids) for r in long) > sum(len(r.completion_ids) for r in short)
    cut, masked = gradient(parts, short), gradient(parts, long, PlacedTokens(type="first", tokens=5))
    torch.testing.assert_close(masked, cut, rtol=1e-4, atol=1e-6 * float(cut.abs().max()))
    assert (gradient(parts, long) - cut).abs().max() > 1e-3


def test_all_equals_no_selection_and_a_selection_that_is_long_enough(parts: Parts) -> None:
    rollouts = sample_rollouts(parts, 0, 12)
    plain = gradient(parts, rollouts)
    assert torch.equal(gradient(parts, rollouts, AllTokens()), plain)
    for kind in ("first", "last", "middle", "random", "window"):
        rule = PlacedTokens(type=kind, tokens=12)  # type: ignore[arg-type]
        assert torch.equal(gradient(parts, rollouts, rule), plain)


@pytest.mark.parametrize("rule", [r for r in RULES if not isinstance(r, FormatTokens)])
@pytest.mark.parametrize("denominator", ["trajectory", "token"])
def test_micro_batches_never_change_the_gradient(parts: Parts, rule: Selection, denominator: str) -> None:
    parts = with_training(parts, denominator=denominator)
    rollouts = sample_rollouts(parts, 0, 12)
    whole = gradient(parts, rollouts, rule)
    split = gradient(with_training(parts, micro_batch=2, denominator=denominator), rollouts, rule)
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=3e-6 * float(whole.abs().max()))


def test_a_run_reports_the_tokens_it_trains(tmp_path: Path) -> None:
    config = make_config(tmp_path, "horizon.tokens=12", "selection={type: random, tokens: 4}")
    report, readings = train_step(make_parts(tmp_path / "run", config), 0, 0)
    lengths = [len(r.completion_ids) for micro in readings for r in micro.rollouts]
    assert report.metrics["tokens_trained"] == sum(min(4, n) for n in lengths) < report.metrics["tokens"]
    values = np.concatenate([m.divergence for m in readings])
    weights = np.concatenate([m.weight for m in readings])
    assert report.metrics["loss"] == pytest.approx(float((values * weights).sum()))
    plain, _ = train_step(make_parts(tmp_path / "all", make_config(tmp_path)), 0, 0)
    assert plain.metrics["tokens_trained"] == plain.metrics["tokens"]


def test_format_classes_are_read_from_the_vocabulary(tmp_path: Path) -> None:
    config = make_config(tmp_path, "horizon.tokens=12", "selection={type: format, classes: [stop]}")
    parts = make_parts(tmp_path / "run", config)
    rollouts = sample_rollouts(parts, 0, 12)
    stopped = sum(r.stopped for r in rollouts)
    assert 0 < stopped < len(rollouts)
    assert sum(parts.selector.counts(rollouts)) == stopped
    assert gradient(parts, rollouts).abs().max() > 1e-3
    assert parts.selector.class_V is not None
    assert CLASSES[parts.selector.class_V[10]] == "word"


def test_a_step_that_trains_nothing_says_so(tmp_path: Path) -> None:
    config = make_config(tmp_path, "selection={type: format, classes: [number]}")
    parts = make_parts(tmp_path / "run", config)
    with pytest.warns(UserWarning, match="chose no token of step 1"):
        report, _ = train_step(parts, 0, 0)
    assert (report.metrics["tokens_trained"], report.metrics["loss"], report.metrics["grad_norm"]) == (0, 0.0, 0.0)


def test_a_selection_that_selects_everything_is_pointed_out(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"selection.tokens=6 is no less than horizon.tokens=6"):
        make_parts(tmp_path / "run", make_config(tmp_path, "selection={type: top, tokens: 6}"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make_parts(tmp_path / "less", make_config(tmp_path, "selection={type: top, tokens: 5}"))
    with pytest.raises(ConfigError, match="selection"):
        make_config(tmp_path, "selection={type: top, by: [entropy]}")
