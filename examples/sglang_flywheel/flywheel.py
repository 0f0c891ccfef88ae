"""The loop as a library, on whichever engine the configuration names: a learner in a thread, serving in front of it.

python examples/sglang_flywheel/flywheel.py traffic.requests=40                        # the embedded engine
python examples/sglang_flywheel/flywheel.py --config examples/sglang_flywheel/laptop.yaml traffic.requests=40
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path

from aurora_rl.cli import spec
from aurora_rl.cli.config import load_config
from aurora_rl.cli.engines import serving
from aurora_rl.telemetry.log import MetricsLog


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    run_dir = Path(config.run_dir or time.strftime("runs/example-%Y%m%d-%H%M%S"))
    run_dir.mkdir(parents=True)
    logs = {half: MetricsLog(run_dir / "metrics.jsonl", half) for half in ("server", "learner")}

    prompts = spec.check(config)
    target = spec.load(config)
    requests = spec.request_queue(config, target, prompts)
    drafter, theirs = spec.first_drafter(config, target, requests, run_dir / "drafter-day0")

    learner = spec.learner(theirs, logs["learner"], run_dir)
    done = threading.Event()
    learning = threading.Thread(target=lambda: [learner.step() for _ in iter(done.is_set, True)])
    learning.start()
    try:
        half = serving(config, target, requests, drafter, logs["server"], run_dir)
        try:
            while half.server.step():
                pass
        finally:
            half.close()
    finally:
        done.set()
        learning.join()
        learner.close()
    server = half.server
    count = len(server.finished)
    first, last = server.acceptance(0, count // 4), server.acceptance(count - count // 4, count)
    print(f"{count} requests, {len(server.swap_ms)} swaps, acceptance length {first:.2f} -> {last:.2f}, in {run_dir}")


if __name__ == "__main__":
    main()
