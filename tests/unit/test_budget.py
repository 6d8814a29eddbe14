"""What generating takes, and the setting that fits some minutes: arithmetic against clocks with known answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from headstart.assemble import speed as speed_module
from headstart.assemble.speed import Speed, duration, elapsed, growing, timed, width
from headstart.config.loader import load as load_config
from headstart.diagnosis.budget import FEWEST, SHORTEST, Prices, Setting, thinned
from headstart.distillation.run import load
from headstart.evaluation import load as load_module
from headstart.evaluation.load import Load, cut, warn_of_cost
from headstart.ranks.runtime import Runtime
from headstart.records import Prompt, Rollout, Sampling

SLOW = Speed(step=0.05, row=0.0045, encoded=0.003)
"""A model of 135 M on one core."""
FULL = Setting(64, (4, 8, 16, 32, 64, 128, 256), 512)


@dataclass
class FakeClock:
    """Time that passes only when somebody works."""

    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()
    monkeypatch.setattr(speed_module, "time", fake)
    return fake


@dataclass
class Typist:
    """An engine that takes `overhead` a call and else what `speed` says; ends after `longest` tokens."""

    clock: FakeClock
    speed: Speed
    overhead: float = 0.5
    longest: int = 100

    def generate(self, prompts: Sequence[Prompt], *, samples: int, max_tokens: int, **_: Any) -> list[Rollout]:
        count, tokens = len(prompts) * samples, min(max_tokens, self.longest)
        encoded = sum(len(p.token_ids) for p in prompts)
        self.clock.now += self.overhead + self.speed.seconds(count, tokens - 1, encoded, count)
        return [Rollout(p, s, (1,) * tokens, False) for p in prompts for s in range(samples)]


PROMPTS = [Prompt(i, str(i), (1,) * (20 + i), (1,) * (20 + i)) for i in range(30)]


@pytest.mark.parametrize("batch", [1, 64])
def test_timing_finds_the_speed_whatever_a_call_costs_beside(clock: FakeClock, batch: int) -> None:
    found = timed(Typist(clock, SLOW), PROMPTS, batch, Sampling())  # type: ignore[arg-type]
    assert found.encoded == pytest.approx(0.003)
    assert found.seconds(batch, 100, 0, batch) == pytest.approx(SLOW.seconds(batch, 100, 0, batch))
    assert found.per_second(batch) == pytest.approx(batch / (0.05 + 0.0045 * batch))


def test_a_slow_model_is_timed_in_few_calls_and_one_that_stops_at_once_has_a_speed(clock: FakeClock) -> None:
    start = clock.now
    slow = Speed(5.0, 0.4, 0.3)
    found = timed(Typist(clock, slow), PROMPTS, 64, Sampling())  # type: ignore[arg-type]
    assert clock.now - start < 400, "a step of the whole batch takes 31 s"
    assert found.row == pytest.approx(0.4, rel=0.01)
    mute = timed(Typist(clock, SLOW, longest=1), PROMPTS, 64, Sampling())  # type: ignore[arg-type]
    assert mute.per_second(64) > 0


def test_steps_are_those_of_the_longest_row_or_of_a_full_batch() -> None:
    assert Speed(1, 0, 0).seconds(8, 10, 0, 64) == 10
    assert Speed(1, 0, 0).seconds(8, 10, 0, 64, longest=30) == 30
    assert Speed(1, 0, 0).seconds(128, 10, 0, 64) == 20
    assert Speed(0, 1, 2).seconds(128, 10, 7, 64) == 1294
    assert Speed(1, 1, 1).seconds(0, 10, 0, 64) == 0


def prices(votes: int = 0) -> Prices:
    return Prices(SLOW, replace(SLOW, row=0.009), 64, 96.0, votes)


@pytest.mark.parametrize("votes", [0, 4])
@pytest.mark.parametrize("full", [FULL, Setting(64, (4, 11, 28, 74, 195, 514, 1357), 3584), Setting(5, (16,), 200)])
def test_the_chosen_setting_fits_and_more_time_never_buys_less(full: Setting, votes: int) -> None:
    p, before = prices(votes), 0.0
    for seconds in (30, 100, 300, 600, 1200, 3600, 20_000, 10_000_000):
        chosen = p.smaller(full, seconds)
        smallest = (chosen.problems, chosen.max_tokens) == (1, min(SHORTEST, full.max_tokens))
        assert p.whole(chosen) <= seconds or smallest
        assert 0 < chosen.problems <= full.problems
        assert chosen.max_tokens <= full.max_tokens
        bought = chosen.problems * len(chosen.lengths) * chosen.max_tokens
        assert bought >= 0.8 * before  # a grid of 4 gives way to one of 7 at fewer problems
        before = bought
    assert chosen == full


def test_problems_give_way_first_then_lengths_then_tokens() -> None:
    p, fewest = prices(), replace(FULL, problems=FEWEST)
    sparse = replace(fewest, lengths=thinned(FULL.lengths, 2))
    assert p.smaller(FULL, p.whole(replace(FULL, problems=31)) + 1) == replace(FULL, problems=31)
    assert p.smaller(FULL, p.whole(fewest) + 1) == fewest
    thin = p.smaller(FULL, p.whole(fewest) - 1)
    assert (len(thin.lengths), thin.max_tokens) == (4, 512)
    assert thin.problems >= FEWEST
    short = p.smaller(FULL, p.whole(sparse) - 1)
    assert (short.problems, len(short.lengths)) == (FEWEST, 2)
    assert 400 < short.max_tokens < 512
    assert max(short.lengths) < short.max_tokens
    assert p.smaller(FULL, 1).problems == 1, "and below that problems once more"


def test_thinned_lengths_are_spread() -> None:
    assert thinned(FULL.lengths, 2) == (8, 128)
    assert thinned(FULL.lengths, 4) == (4, 16, 64, 256)
    assert thinned((4, 8), 4) == (4, 8)


@pytest.mark.parametrize("each", [0.7, 3.0, 20.0, 90.0])
def test_work_grows_from_the_front_until_the_time_is_over(clock: FakeClock, each: float) -> None:
    asked: list[int] = []

    def work(count: int) -> int:
        clock.now += each * (count - sum(asked[-1:])) + 1
        asked.append(count)
        return count

    end = clock.now + 300
    found = growing(2, 200, end, work, tail=each / 4)
    assert asked == sorted(set(asked))
    assert clock.now + found * each / 4 <= end
    assert found == 200 or found * 1.25 * each > 0.4 * 300 or found == 2


def test_progress_in_given_time_is_time(clock: FakeClock) -> None:
    heard: list[tuple[int, int, str]] = []
    progress = elapsed(lambda done, total, text="", /: heard.append((done, total, text)), clock.now + 60, 1.0)
    for _ in range(3):
        progress(0, 7, "votes")
        clock.now += 45
    assert heard == [(0, 60, "votes"), (45, 60, "votes"), (60, 60, "votes")]


def test_words() -> None:
    words = ["3 s", "119 s", "2 min", "120 min", "2.0 h", "2.3 days"]
    assert [duration(seconds) for seconds in (3, 119, 121, 7199, 7201, 200_000)] == words
    assert (width(8), width(96)) == (35, 10)


def test_an_evaluation_gives_up_problems_then_samples() -> None:
    asked = Load(200, 4, 1000, 100.0, 256)

    def price(load: Load) -> float:
        return load.problems * load.samples * 10.0

    assert asked.smaller(price, 8000) == asked
    assert asked.smaller(price, 400) == replace(asked, problems=10)
    assert asked.smaller(price, 170) == replace(asked, problems=8, samples=2)
    assert asked.smaller(price, 30) == replace(asked, problems=3, samples=1)
    assert asked.smaller(price, 30, samples=2) == replace(asked, problems=1, samples=2)
    assert asked.announcement(SLOW).startswith("200 problems x 4 of at most 1,000 tokens: at most 800,000 tokens")
    assert "--minutes 10 would take 25 problems x 4 or more" in asked.announcement(SLOW)
    assert "--minutes" not in replace(asked, problems=8, samples=1).announcement(SLOW)


def test_an_evaluation_dearer_than_its_training_is_said_before_it(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    given = load(load_config("recipe:tiny-esr", ["training.device=cpu"]), Runtime.start("cpu"))
    assert given.questions is not None
    assert not [w for w in recwarn if "evaluations of" in str(w.message)], "the bundled run needs no warning"

    def said(speed: Speed, *overrides: str, samples: int = 4) -> list[str]:
        monkeypatch.setattr(load_module, "timed", lambda *_: speed)
        recwarn.clear()
        questions = cut(given.questions, 96, samples) if given.questions else None
        assert questions is not None
        warn_of_cost(load_config("recipe:tiny-esr", overrides), given.pair, given.prompts.prompts, questions)
        return [str(w.message) for w in recwarn]

    assert said(SLOW, "training.steps=100000", "evaluation.every=null") == []
    assert said(Speed(1e-4, 1e-6, 1e-6), "training.steps=3") == [], "nobody minds some minutes"
    (warning,) = said(SLOW, "training.steps=3", "evaluation.every=1", samples=16)
    assert warning.startswith("4 evaluations of 96 problems x 16 of at most 200 tokens may take")
    assert "evaluation.limit=" in warning
    assert "evaluation.samples=" in warning
    assert "evaluation.max_tokens=" in warning
