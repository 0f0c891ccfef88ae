"""On a child's PYTHONPATH: its wall clock is off by as many seconds as the file AURORA_TEST_CLOCK says."""

import os
import time

_time = time.time


def _jumping() -> float:
    with open(os.environ["AURORA_TEST_CLOCK"]) as file:
        return _time() + float(file.read() or 0)


if "AURORA_TEST_CLOCK" in os.environ:  # not where the module is only looked through for doctests
    time.time = _jumping
