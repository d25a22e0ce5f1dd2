"""The clock of a run."""

from __future__ import annotations

import time

from lora_merge.runtime.clock import Clock


def test_a_phase_in_several_blocks_has_the_seconds_of_all():
    clock = Clock({"plan": 1.5})
    for _ in range(3):
        with clock("seal"):
            time.sleep(0.02)
    with clock("publish"):
        pass
    assert clock.seconds["seal"] >= 0.06
    assert clock.seconds["publish"] < 0.06
    assert list(clock.seconds) == ["plan", "seal", "publish"]
    assert clock.seconds["plan"] == 1.5
