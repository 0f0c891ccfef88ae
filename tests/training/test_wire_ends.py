"""What brings trajectories to a learner, and takes its weights, has all that the learner uses."""

from __future__ import annotations

import pytest

from aurora_rl.adaptation.simulation import LocalWire
from aurora_rl.collectors.collector import ZMQCollector
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.weights import WeightPublisher
from aurora_rl.training.wire_ends import TrajectorySource, WeightSink

HANDSHAKE = Handshake(1, "tiny", "", (0, 1), "", "eagle3")
ENDS = {
    TrajectorySource: [LocalWire, lambda: ZMQCollector("tcp://127.0.0.1:*", handshake=HANDSHAKE)],
    WeightSink: [LocalWire, lambda: WeightPublisher("tcp://127.0.0.1:*", handshake=HANDSHAKE)],
}


@pytest.mark.parametrize("end", ENDS)
def test_each_end_has_what_a_learner_uses(end: type) -> None:
    names = {name for name in (*vars(end), *end.__annotations__) if not name.startswith("_")}
    assert len(names) > 4
    for make in ENDS[end]:
        built = make()
        try:
            assert {name for name in names if not hasattr(built, name)} == set()
        finally:
            (built.shutdown if hasattr(built, "shutdown") else built.close)()
