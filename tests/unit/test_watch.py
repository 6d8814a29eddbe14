"""Ranks that watch each other, over a store in memory and a clock of the test's own."""

from __future__ import annotations

import time

import pytest

from headstart.ranks.launch import Launch
from headstart.ranks.watch import BEAT, JOINING, SILENCE, UNREACHABLE, Watch


class Store:
    """The calls of a torch.distributed.Store that a watch makes; `down` as when its process is gone."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.texts: dict[str, str] = {}
        self.down = False

    def add(self, key: str, count: int) -> int:
        if self.down:
            raise RuntimeError("Connection reset by peer")
        self.numbers[key] = self.numbers.get(key, 0) + count
        return self.numbers[key]

    def check(self, keys: list[str]) -> bool:
        return keys[0] in self.texts

    def get(self, key: str) -> bytes:
        return self.texts[key].encode()

    def compare_set(self, key: str, expected: str, value: str) -> None:
        assert expected == ""
        self.texts.setdefault(key, value)


def watches(store: Store, count: int = 3) -> list[Watch]:
    return [Watch(store, Launch(rank, count, rank)) for rank in range(count)]


def test_ranks_that_beat_are_alive_however_long_the_run() -> None:
    store, now = Store(), time.monotonic()
    ranks = watches(store)
    for beat in range(200):
        assert [rank.look(now + BEAT * beat) for rank in ranks] == [None] * 3


def test_a_silent_rank_ends_all_within_a_minute() -> None:
    """Rank 2 stops; the first rank sees it, and the others read it from the store."""
    store, now = Store(), time.monotonic()
    first, second, third = watches(store)
    for rank in (first, second, third, first):
        assert rank.look(now) is None
    later, problem = now, None
    while problem is None:
        later += BEAT
        problem, other = first.look(later), second.look(later)
    assert SILENCE < later - now < 50
    assert problem.startswith("rank 2 has not answered for 40 s")
    assert other == problem


def test_the_first_rank_is_watched_by_the_others() -> None:
    store, now = Store(), time.monotonic()
    first, second, _ = watches(store)
    first.look(now)
    assert second.look(now) is None
    assert second.look(now + SILENCE) is None
    problem = second.look(now + SILENCE + BEAT)
    assert problem is not None
    assert problem.startswith("rank 0 has not answered")


def test_a_rank_may_take_longer_to_join() -> None:
    store, now = Store(), time.monotonic()
    first = watches(store, 2)[0]
    assert first.look(now + JOINING - 1) is None
    problem = first.look(now + JOINING + 1)
    assert problem is not None
    assert problem.startswith("rank 1 has not joined the others for 301 s")


def test_a_rank_that_leaves_in_good_order_is_not_missed() -> None:
    store, now = Store(), time.monotonic()
    first, second = watches(store, 2)
    first.look(now)
    second.look(now)
    second.close()
    assert first.look(now + 10 * SILENCE) is None
    assert first.said() is None


def test_the_message_of_a_failing_rank_reaches_all_and_the_first_one_stays() -> None:
    store = Store()
    first, second, third = watches(store)
    second.tell("memory ran out:\n  CUDA")
    third.tell("something that follows from it")
    problem = first.look(time.monotonic())
    assert problem is not None
    assert problem.startswith("rank 1 on ")
    assert problem.endswith(" has ended: memory ran out: CUDA")
    assert third.said() == problem


def test_a_store_that_is_gone_is_waited_for_a_while() -> None:
    store = Store()
    rank = watches(store)[1]
    now = time.monotonic()
    rank.look(now)
    store.down = True
    with pytest.raises(RuntimeError):
        rank.look(now + BEAT)
    assert rank.unreachable(now + UNREACHABLE) is None
    problem = rank.unreachable(now + UNREACHABLE + 1)
    assert problem is not None
    assert "has not answered for 31 s" in problem
    rank.tell("an error while nobody listens")
    rank.close()


def test_an_earlier_attempt_of_the_same_launch_is_not_taken_for_this_one() -> None:
    store = Store()
    Watch(store, Launch(1, 2, 1), "0").tell("of the attempt before")
    assert Watch(store, Launch(0, 2, 0), "1").look(time.monotonic()) is None


def test_the_process_is_ended_with_one_line(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    store, ended = Store(), []
    monkeypatch.setattr("headstart.ranks.watch.BEAT", 0.01)
    watch = Watch(store, Launch(0, 2, 0), end=ended.append)
    Watch(store, Launch(1, 2, 1)).tell("memory ran out")
    watch.start()
    deadline = time.monotonic() + 20
    while not ended and time.monotonic() < deadline:
        time.sleep(0.02)
    watch.close()
    assert ended[0] == 1
    assert (
        capfd.readouterr()
        .err.splitlines()[0]
        .endswith("has ended: memory ran out; --resume continues from the last checkpoint")
    )
