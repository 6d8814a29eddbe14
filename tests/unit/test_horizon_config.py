"""Horizon sections that cannot work are refused before anything is loaded, with what to do."""

from __future__ import annotations

import pytest

from headstart.config.horizon import ProbesConfig
from headstart.config.loader import load
from headstart.config.schema import Config
from headstart.distillation.horizon import loss_side, make_horizon, probe_every
from headstart.errors import ConfigError

REQUIRED = ("student.path=a", "teacher.path=b", "prompts.source=p.jsonl")


def config(*overrides: str) -> Config:
    return load(None, [*REQUIRED, *overrides])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["horizon={preset: code, tokens: 60}"], "horizon.preset code is 50; leave out one of them"),
        (
            ["horizon={type: overlap, min_tokens: 9, max_tokens: 8}"],
            "less than horizon.min_tokens=9; raise it",
        ),
        (["horizon={type: mixed, tokens: 9, max_tokens: 8}"], "found 9, not between 1 and horizon.max_tokens=8"),
        (["horizon={type: overlap, tokens: 9}"], "found 9, not between 16 and horizon.max_tokens=3584"),
        (["horizon.type=damage"], "judges responses, and prompts.answer_column is null; name the column"),
        (["horizon={type: scheduled, gate: recoverability}"], "or set probes.label_free true"),
        (
            ["horizon.type=damage", "probes={every: 0, label_free: true}"],
            "goes by probes; leave it out or set it above 0",
        ),
        (["horizon={type: roulette, weighted: true}"], "use training.denominator sum, or horizon.weighted false"),
        (
            ["horizon={type: mixed, weighted: true}", "training.denominator=sum", "selection={type: last, tokens: 3}"],
            "use selection {type: all}, or horizon.weighted false",
        ),
        (
            ["horizon={type: custom, path: 'm:H'}", "probes.every=3"],
            "this custom horizon has no argument max_tokens; set it",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_a_remedy(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(*overrides)
    assert said in str(caught.value)


def test_what_can_work_is_not() -> None:
    assert config("horizon.preset=tools").horizon.tokens == 150  # type: ignore[union-attr]
    assert load(None, [*REQUIRED[:2], "prompts.source=tiny", "horizon.type=damage"]).horizon.type == "damage"
    config("horizon.type=damage", "probes.label_free=true")
    config("horizon={type: scheduled, gate: overlap}")  # overlap needs no answers
    config("horizon={type: roulette, weighted: true}", "training.denominator=sum")


def test_probes_run_where_they_are_needed_or_asked_for() -> None:
    assert probe_every(config()) == 0
    assert probe_every(config("probes.every=7")) == 7
    assert probe_every(config("horizon={type: scheduled, gate: overlap}")) == 50
    assert probe_every(config("horizon.type=damage", "probes={every: 5, label_free: true}")) == 5
    assert ProbesConfig().every is None


def test_only_weighted_draws_and_the_loss_side_weigh_tokens() -> None:
    def weighs(*overrides: str) -> bool:
        return loss_side(make_horizon(config(*overrides))) is not None

    assert not weighs()
    assert not weighs("horizon.type=roulette")
    assert weighs("horizon={type: roulette, weighted: true}", "training.denominator=sum")
    soft = "horizon={type: custom, path: 'examples.horizons.loss_side:SoftWeights', arguments: {max_tokens: 9}}"
    assert weighs(soft)
    assert weighs("horizon={type: custom, path: 'examples.horizons.loss_side:ChangePoint'}")
    assert config(soft, "probes.every=3").horizon.longest == 9
    policy = make_horizon(config(soft))
    policy.signals = ("colour",)  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="signals has colour; choose gap or margin"):
        loss_side(policy)
