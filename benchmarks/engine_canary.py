"""False alarms and detection delays of the canary by engine, on simulated engines that differ.

A simulated engine has traffic of its own: its chance that a draft is accepted is up to 0.15 off the mean, so that two
engines are up to 0.3 apart, and it wanders from request to request (an autoregression of 0.98). A request takes 20 to
60 rounds of chains of four tokens. An engine's round takes half to twice the usual time, and one of fifty requests four
times as long. Nothing here needs a model.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

import numpy as np
from canary import ACCEPT, DEPTH, accept_for
from common import RESULTS, write_result

from aurora_rl.training.engine_canary import EngineTrial, EngineTrialRules, EngineTrialVerdict

ENGINES = (2, 8)  # of which half have the new weights


class Engine:
    """An engine with its own traffic and its own hardware."""

    def __init__(self, dice: np.random.Generator) -> None:
        self._dice, self._offset, self._mood = dice, dice.uniform(-0.15, 0.15), 0.0
        self._seconds = dice.uniform(0.5, 2.0)

    def request(self, accept: float) -> tuple[int, int, float]:
        """Tokens, rounds and seconds of a request."""
        dice = self._dice
        self._mood = 0.98 * self._mood + dice.normal(0, 0.02)
        rounds = int(dice.integers(20, 60))
        chance = min(max(accept + self._offset + self._mood, 0.0), 0.98) if accept else 0.0
        tokens = int(np.minimum(dice.geometric(1 - chance, rounds), DEPTH + 1).sum())
        return tokens, rounds, rounds * self._seconds * dice.uniform(0.9, 1.1) * (4 if dice.random() < 0.02 else 1)


def trial(rules: EngineTrialRules, count: int, loss: float, seed: int) -> EngineTrialVerdict:
    """Try weights that lose this share of the acceptance length."""
    length = sum(ACCEPT**d for d in range(DEPTH + 1))
    worse, dice = accept_for(max(length * (1 - loss), 1.0)), np.random.default_rng(seed)
    engines = {str(number): Engine(dice) for number in range(count)}
    judged = EngineTrial(rules, list(engines), seed)
    while True:
        for name in (*judged.new, *judged.old):
            new = name in judged.new
            tokens, rounds, seconds = engines[name].request(worse if new else ACCEPT)
            verdict = judged.observe(new=new, tokens=tokens, rounds=rounds, seconds=seconds)
            if verdict is not None:
                return verdict
        if judged.complete:
            judged.draw(list(engines))


def summarized(rules: EngineTrialRules, count: int, loss: float, trials: int) -> dict[str, float | None]:
    found = [trial(rules, count, loss, seed) for seed in range(trials)]
    back = [verdict.pairs * rules.requests for verdict in found if not verdict.promote]
    early = [verdict.pairs * rules.requests for verdict in found if verdict.promote and "ruled out" in verdict.reason]
    return {
        "loss": loss,
        "engines": count,
        "rolled_back": len(back) / trials,
        "promoted_early": len(early) / trials,
        "median_requests_to_rollback": statistics.median(back) if back else None,
        "median_requests_to_early_promotion": statistics.median(early) if early else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nulls", type=int, default=10_000, help="trials of equally good weights")
    parser.add_argument("--trials", type=int, default=300, help="trials of each cell of the grid")
    parser.add_argument("--name", help="name of the result file")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args()
    rules = EngineTrialRules(share=0.5)
    nulls = []
    for rate in (0.05, 0.01):
        equal = EngineTrialRules(share=0.5, false_alarm_rate=rate, margin=1e-9)  # so that few are promoted early
        alarms = sum(not trial(equal, ENGINES[0], 0.0, seed).promote for seed in range(options.nulls))
        nulls.append({"rate": rate, "false_alarms": alarms / options.nulls})
    losses = (-0.3, -0.1, 0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.566)  # the last: nothing is accepted
    grid = [summarized(rules, count, loss, options.trials) for count in ENGINES for loss in losses]
    rule = {name: getattr(rules, name) for name in ("share", "requests", "false_alarm_rate", "margin", "max_requests")}
    write_result(
        __file__,
        options,
        {
            "nulls": nulls,
            "null_trials": options.nulls,
            "rules": rule,
            "trials": options.trials,
            "grid": grid,
        },
    )
    for null in nulls:
        rate = null["rate"]
        if null["false_alarms"] > rate + 3 * math.sqrt(rate * (1 - rate) / options.nulls):
            raise SystemExit(f"{null['false_alarms']:.4f} false alarms, and {rate} are allowed")


if __name__ == "__main__":
    main()
