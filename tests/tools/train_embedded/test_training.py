"""The learning rate over a schedule with a restart."""

from __future__ import annotations

import pytest

from tools.train_embedded.training import Schedule


def test_the_rate_rises_and_falls_twice() -> None:
    schedule = Schedule(steps=100, rate=1.0, refine_steps=50, refine_rate=0.5, warmup=10)
    rates = [schedule.rate_at(step) for step in range(schedule.all_steps)]
    assert len(rates) == 150
    assert max(rates[:100]) == rates[9] == rates[10] == 1.0
    assert max(rates[100:]) == rates[109] == rates[110] == 0.5
    assert rates[0] == pytest.approx(0.1)
    assert rates[100] == pytest.approx(0.05)
    assert rates[99] == pytest.approx(0.02, abs=0.001)
    assert rates[-1] == pytest.approx(0.01, abs=0.001)


def test_without_a_restart_there_is_none() -> None:
    schedule = Schedule(steps=20, rate=1.0, warmup=5)
    assert schedule.all_steps == 20
    assert schedule.rate_at(19) < schedule.rate_at(5) == 1.0
