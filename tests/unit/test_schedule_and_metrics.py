import math
import os
import signal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.config.schema import ScheduleConfig
from headstart.stats import BIN_EDGES, by_position
from headstart.train.optimizer import schedule_factor
from headstart.train.signals import StopRequested, StopSignals


def test_cosine_with_warmup() -> None:
    schedule = ScheduleConfig(type="cosine", warmup=0.1)
    factors = [schedule_factor(schedule, step, 200) for step in range(200)]
    assert factors[0] == pytest.approx(1 / 20)
    assert factors[19] == factors[20] == 1.0
    assert factors[110] == pytest.approx(0.5)
    assert factors[199] == pytest.approx(0.5 * (1 + math.cos(math.pi * 179 / 180)))


@given(st.sampled_from(["cosine", "linear", "constant"]), st.floats(0, 1), st.integers(1, 300), st.integers(0, 10**6))
def test_every_schedule_stays_between_zero_and_the_peak(kind: str, warmup: float, steps: int, where: int) -> None:
    factor = schedule_factor(ScheduleConfig(type=kind, warmup=warmup), where % steps, steps)  # type: ignore[arg-type]
    assert 0 < factor <= 1


def test_divergence_by_position_bins() -> None:
    position = np.array([0, 4, 5, 9, 10, 100])
    value = np.array([1.0, 3.0, 5.0, 5.0, 7.0, 9.0])
    assert by_position(position, value) == {"0-4": 2.0, "5-9": 5.0, "10-19": 7.0, "100-199": 9.0}
    assert sorted(BIN_EDGES) == list(BIN_EDGES)


def test_a_signal_waits_for_the_step_and_cuts_what_may_be_cut() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested == signal.SIGTERM
        with pytest.raises(StopRequested), signals.interruptible():
            pytest.fail("work that may be cut must not start after a signal")
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    with StopSignals() as signals, pytest.raises(StopRequested), signals.interruptible():
        os.kill(os.getpid(), signal.SIGINT)


def test_a_restart_begins_warm_up_and_decay_anew_and_leaves_the_steps_before_as_they_were() -> None:
    short, long = ScheduleConfig(warmup=0.1), ScheduleConfig(warmup=0.1, restarts=(20,))
    factors = [schedule_factor(long, step, 60) for step in range(60)]
    assert factors[:20] == [schedule_factor(short, step, 20) for step in range(20)]
    assert factors[20:] == [schedule_factor(short, step, 40) for step in range(40)]
    steady = ScheduleConfig(type="constant", warmup=0.1, restarts=(20,))
    assert [schedule_factor(steady, step, 60) for step in (0, 1, 20, 59)] == [0.5, 1.0, 1.0, 1.0]
