"""False alarms and detection delays of the canary's test, and what a bad version costs, on simulated rounds.

A simulated round drafts chains of four tokens for each slot. A draft is accepted by a chance that wanders with the
text (an autoregression of 0.98 a round). A round takes a tenth more or less than usual, and one of fifty rounds four
times as long. Nothing here needs a model.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from common import RESULTS, write_result

from aurora_rl.serving.canary import RoundTrial, RoundTrialRules, RoundTrialVerdict
from aurora_rl.statistics import PairedTest

DEPTH, ACCEPT = 4, 0.6
NULLS = ("independent", "correlated", "drifting", "heavy tails")


def windows(kind: str, dice: random.Random) -> Iterator[float]:
    """Figures of neighbouring windows of one drafter."""
    level, index = 0.0, 0
    while True:
        index += 1
        if kind == "independent":
            yield dice.gauss(0, 1)
        elif kind == "correlated":
            level = 0.95 * level + dice.gauss(0, 0.3)
            yield level + dice.gauss(0, 0.3)
        elif kind == "drifting":
            yield 0.1 * index + dice.gauss(0, 1)
        else:
            yield math.tan(math.pi * (dice.random() - 0.5))


def false_alarms(kind: str, rate: float, streams: int, pairs: int) -> float:
    """Share of streams of one drafter, in pairs of drawn order, on which the test ever gives alarm."""
    dice, alarms = random.Random(0), 0
    for _ in range(streams):
        source, test = windows(kind, dice), PairedTest(rate)
        for _ in range(pairs):
            first, second = next(source), next(source)
            test.add(second - first if dice.random() < 0.5 else first - second)
        alarms += test.rejected
    return alarms / streams


def accept_for(length: float) -> float:
    """Return the chance of a draft at which chains of ``DEPTH`` have this acceptance length."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**d for d in range(DEPTH + 1)) < length else (low, middle)
    return low


class Traffic:
    """Rounds of a server with some slots."""

    def __init__(self, slots: int, seed: int) -> None:
        self._dice, self._moods = random.Random(seed), [0.0] * slots

    def round(self, accept: float) -> tuple[int, float]:
        """Tokens and seconds of a round."""
        dice, tokens = self._dice, 0
        for slot, mood in enumerate(self._moods):
            self._moods[slot] = 0.98 * mood + dice.gauss(0, 0.04)
            chance, delivered = min(max(accept + mood, 0.0), 0.98) if accept else 0.0, 1
            while delivered <= DEPTH and dice.random() < chance:
                delivered += 1
            tokens += delivered
        return tokens, dice.uniform(0.9, 1.1) * (4 if dice.random() < 0.02 else 1)


def trial(rules: RoundTrialRules, slots: int, loss: float, seed: int) -> tuple[RoundTrialVerdict, int]:
    """Try a version that loses this share of the acceptance length; return the verdict and its rounds."""
    length = sum(ACCEPT**d for d in range(DEPTH + 1))
    traffic, judged, drafted = Traffic(slots, seed), RoundTrial(rules, seed), 0
    worse = accept_for(max(length * (1 - loss), 1.0))
    while True:
        new = judged.new
        drafted += new
        tokens, seconds = traffic.round(worse if new else ACCEPT)
        if (verdict := judged.observe(tokens, slots, seconds)) is not None:
            return verdict, drafted


def summarized(rules: RoundTrialRules, slots: int, loss: float, trials: int) -> dict[str, float | None]:
    found = [trial(rules, slots, loss, seed) for seed in range(trials)]
    back = [verdict.rounds for verdict, _ in found if not verdict.promote]
    early = [verdict.rounds for verdict, _ in found if verdict.promote and verdict.rounds < (rules.max_rounds or 0)]
    lost = [drafted * loss for _, drafted in found]
    return {
        "loss": loss,
        "slots": slots,
        "rolled_back": len(back) / trials,
        "promoted_early": len(early) / trials,
        "median_rounds_to_rollback": statistics.median(back) if back else None,
        "median_rounds_to_early_promotion": statistics.median(early) if early else None,
        # As many rounds of the old weights would have delivered what was lost: a twentieth of 20 times as many rounds.
        "rounds_lost_median": statistics.median(lost),
        "rounds_lost_p99": sorted(lost)[min(int(0.99 * trials), trials - 1)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=10_000, help="streams of each null hypothesis")
    parser.add_argument("--pairs", type=int, default=128, help="pairs of a stream, with a look after each")
    parser.add_argument("--trials", type=int, default=1000, help="trials of each cell of the grid")
    parser.add_argument("--name", help="name of the result file")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args()
    began, rules = time.perf_counter(), RoundTrialRules()
    nulls = [
        {"stream": kind, "rate": rate, "false_alarms": false_alarms(kind, rate, options.streams, options.pairs)}
        for kind in NULLS
        for rate in (0.05, 0.01)
    ]
    losses = (-0.3, -0.1, 0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.566)  # the last: nothing is accepted
    grid = [summarized(rules, slots, loss, options.trials) for slots in (1, 2, 8) for loss in losses]
    rule = {name: getattr(rules, name) for name in ("share", "window", "false_alarm_rate", "margin", "max_rounds")}
    write_result(
        __file__,
        options,
        {
            "streams": options.streams,
            "looks": options.pairs,
            "nulls": nulls,
            "rules": rule,
            "trials": options.trials,
            "grid": grid,
            "seconds": round(time.perf_counter() - began, 1),
        },
    )
    for null in nulls:
        rate = null["rate"]
        if null["false_alarms"] > rate + 3 * math.sqrt(rate * (1 - rate) / options.streams):
            raise SystemExit(f"{null['stream']}: {null['false_alarms']:.4f} false alarms, and {rate} are allowed")


if __name__ == "__main__":
    main()
