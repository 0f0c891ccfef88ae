"""The loop in one process, put together from a configuration as the command does: a learner in a thread, and serving.

python examples/sglang_flywheel/flywheel.py traffic.requests=40                        # the embedded engine
python examples/sglang_flywheel/flywheel.py --config examples/sglang_flywheel/laptop.yaml traffic.requests=40
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path

from aurora_rl.cli.assembly import first_drafter, load, request_queue, traffic
from aurora_rl.cli.config import load_config
from aurora_rl.cli.embedded import embedded_server
from aurora_rl.cli.learner import build_learner
from aurora_rl.cli.remote import remote_server
from aurora_rl.cli.spec import resolve
from aurora_rl.telemetry.log import MetricsLog


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    run_dir = Path(config.run_dir or time.strftime("runs/example-%Y%m%d-%H%M%S"))
    if run_dir.exists():
        parser.error(f"run_dir={run_dir} exists; name another")
    run_dir.mkdir(parents=True)
    logs = {half: MetricsLog(run_dir / "metrics.jsonl", half) for half in ("server", "learner")}

    spec, prompts = resolve(config), traffic(config)
    target = load(spec)
    requests = request_queue(spec, target, prompts)
    drafter, learner_config = first_drafter(spec, target, requests.first_prompts(64), run_dir / "drafter-day0")

    learner = build_learner(resolve(learner_config), logs["learner"], run_dir)
    done = threading.Event()
    learning = threading.Thread(target=lambda: [learner.step() for _ in iter(done.is_set, True)])
    learning.start()
    try:
        if config.engine.remote:
            server = remote_server(spec, target, requests, drafter, logs["server"], run_dir)
        else:
            server = embedded_server(spec, target, requests, requests.first_prompts(1)[0], drafter, logs["server"])
        try:
            while server.step():
                pass
        finally:
            server.close()
    finally:
        done.set()
        learning.join()
        learner.close()
    stats = server.stats
    count = len(stats.finished)
    quarters = stats.acceptance(0, count // 4), stats.acceptance(count - count // 4, count)
    first, last = ("–" if each is None else f"{each:.2f}" for each in quarters)  # None: nothing was drafted
    print(f"{count} requests, {len(stats.swap_ms)} swaps, acceptance length {first} -> {last}, in {run_dir}")


if __name__ == "__main__":
    main()
