"""On the PYTHONPATH of a daemon: its wall clock is off by SMSD_TEST_CLOCK_SECONDS. Other clocks are right."""

import os
import time

_OFF = float(os.environ.get("SMSD_TEST_CLOCK_SECONDS", "0"))
_right_time, _right_time_ns = time.time, time.time_ns


def _wrong_time() -> float:
    return _right_time() + _OFF


def _wrong_time_ns() -> int:
    return _right_time_ns() + int(_OFF * 1e9)


time.time, time.time_ns = _wrong_time, _wrong_time_ns
