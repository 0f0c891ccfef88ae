"""The whole loop on a file of prompts: runs `aurora-rl flywheel` and keeps its summary with the hardware.

python benchmarks/flywheel.py --prompts code.jsonl --limit 600 --slots 1 --max-new-tokens 128
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from common import arguments, parse, write_result


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--keep", help="run folder to keep")
    parser.add_argument("overrides", nargs="*", help="key=value pairs for the run")
    options = parse(parser)
    with TemporaryDirectory() as folder:
        run_dir = Path(options.keep or folder)
        pairs = [
            f"run_dir={run_dir}",
            f"engine.slots={options.slots}",
            f"engine.threads={options.threads}",
            f"max_new_tokens={options.max_new_tokens}",
            f"traffic.limit={options.limit}",
            f"device={options.device}",
            "http.port=null",
            *([f"traffic.path={options.prompts}"] if options.prompts else []),
            *options.overrides,
        ]
        subprocess.run([sys.executable, "-m", "aurora_rl.cli.main", "flywheel", *pairs], check=True)
        summary = json.loads((run_dir / "summary.json").read_text())
        events = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    gates = [e for e in events if e["event"] == "gate"]
    costs = next((e["round_ms"] for e in events if e["event"] == "costs"), None)  # a fixed shape has none
    requests = [e for e in events if e["event"] == "request"]
    tenth = max(len(requests) // 10, 1)
    curve = []
    for first in range(0, len(requests) - tenth + 1, tenth):
        part = requests[first : first + tenth]
        rounds = sum(e["speculative_rounds"] for e in part)
        curve.append(sum(e["speculative_tokens"] for e in part) / rounds if rounds else None)
    figures = {
        "slots": options.slots,
        "threads": {"server": options.threads, "learner": 1},
        "summary": summary,
        "acceptance_length_by_tenth": curve,
        "round_ms_at_start": costs,
        "candidates": len(gates),
        "published": sum(g["publish"] for g in gates),
    }
    write_result(__file__, options, figures)


if __name__ == "__main__":
    main()
