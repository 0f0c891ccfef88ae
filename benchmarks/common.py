"""What every benchmark shares: its arguments, its prompts and the shape of its result."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aurora_rl import Request, SamplingParams
from aurora_rl.serving.requests import RequestQueue
from aurora_rl.telemetry.rates import Rates
from aurora_rl.workload.traffic import Prompt, generate_traffic, read_jsonl

RESULTS = Path(__file__).parent / "results"
MAX_LENGTH = 1024  # of prompt and completion


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--prompts", help="JSONL file of prompts; without it the built-in generator's")
    parser.add_argument("--limit", type=int, default=16, help="prompts to use")
    parser.add_argument("--skip", type=int, default=0, help="prompts to leave out at the start of the file")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", help="name of the result file")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, and end with one line where the device is not there."""
    options = parser.parse_args()
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {options.device} cannot be used here: {str(error).splitlines()[0]}")
    return options


def prompts(options: argparse.Namespace) -> list[Prompt]:
    count = options.skip + options.limit
    found = read_jsonl(options.prompts, limit=count) if options.prompts else generate_traffic(count)
    return found[options.skip :]


def request_queue(
    options: argparse.Namespace, found: list[Prompt], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> RequestQueue:
    """Greedy requests of the prompts, in their order."""
    return RequestQueue(
        found,
        tokenizer,
        vocab_size=model.config.get_text_config().vocab_size,
        max_length=MAX_LENGTH,
        sampling_params=SamplingParams(max_tokens=options.max_new_tokens),
    )


def usual_request(options: argparse.Namespace, requests: RequestQueue) -> Request:
    """The first prompt, by which rounds are timed before serving."""
    sampling = SamplingParams(max_tokens=options.max_new_tokens)
    return Request(0, torch.tensor(requests.first_prompts(1)[0]), sampling)


def processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line for line in lines if line.startswith("flags"))
    except (OSError, StopIteration):
        return platform.processor()
    return f"{model}, {os.cpu_count()} cores" + (", AVX512_BF16" if "avx512_bf16" in flags else "")


def _without_folders(argument: str) -> str:
    return ",".join(Path(part).name if "/" in part else part for part in argument.split(","))


def over_plain(measured: Rates) -> float | None:
    """Return speculative over plain tokens per second, however few plain rounds the script has asked for."""
    return measured.speculative / measured.baseline if measured.baseline and measured.speculative else None


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return two of the values between which the median lies with 95% or more, whatever the distribution.

    With fewer than six values there are none.
    """
    count, ordered = len(values), sorted(values)
    # The k-th smallest exceeds the median if fewer than k of the values are below it.
    tails = [sum(math.comb(count, i) for i in range(k)) / 2**count for k in range(1, count // 2 + 1)]
    k = sum(tail <= 0.025 for tail in tails)
    return (ordered[k - 1], ordered[-k]) if k else None


def cost(without: Sequence[float], with_: Sequence[float], goal: float) -> dict[str, Any]:
    """Return by what share figures fell, pair by pair: the median and its interval."""
    costs = [round(1 - after / before, 4) for before, after in zip(without, with_, strict=True)]
    middle = statistics.median(costs)
    return {"cost": middle, "interval_95": median_interval(costs), "within_goal": middle <= goal, "pairs": costs}


def write_result(script: str, options: argparse.Namespace, figures: dict) -> None:
    """Print the figures and keep them with hardware, versions and command."""
    packages = ("torch", "transformers", "torchrl", "tensordict")
    result = {
        "command": " ".join(
            ["python", f"benchmarks/{Path(script).name}", *(_without_folders(a) for a in sys.argv[1:])]
        ),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": processor(),
        "load_average_at_end": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
        **figures,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.name or Path(script).stem}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(figures, indent=2))
    print(f"written to {path}")
