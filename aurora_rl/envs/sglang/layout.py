"""Processes of an SGLang server: layouts that cannot be learned from, and where the processes run on this host."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any


def layout_fault(arguments: Mapping[str, Any]) -> str:
    """Return why a server of several GPUs cannot be learned from, by SGLang's arguments; empty if it can.

    Example:
        >>> layout_fault({"tp_size": 2, "pp_size": 2})
        'pp_size=2 is not supported: no rank has the whole of target and drafter; use --tp-size'
    """
    size, pipeline = arguments["tp_size"], arguments["pp_size"]
    if pipeline != 1:
        return f"pp_size={pipeline} is not supported: no rank has the whole of target and drafter; use --tp-size"
    if arguments["enable_dp_attention"]:
        return (
            "enable_dp_attention is not supported: its replicas share layers and one drafter; start without "
            "--enable-dp-attention, then each has a drafter of its own"
        )
    if arguments["attn_cp_size"] != 1:
        return (
            f"attn_cp_size={arguments['attn_cp_size']} is not supported: a rank has features of a part of a prompt "
            "alone; use --tp-size"
        )
    if size > 1 and (backend := arguments["moe_a2a_backend"]) not in (None, "none"):
        return (
            f"moe_a2a_backend={backend!r} is not supported with tp_size={size}: a rank may have features of a part of "
            "the tokens alone; start without --moe-a2a-backend"
        )
    if size > 1 and arguments["speculative_token_map"] and str(arguments["speculative_algorithm"]).upper() == "EAGLE":
        return (
            f"EAGLE with a reduced vocabulary is not supported with tp_size={size}: SGLang takes rows of each rank's "
            "part of the head by ids of the whole vocabulary; start without --speculative-token-map"
        )
    return ""


def ranks_of(arguments: Sequence[str]) -> int:
    """Return how many processes with a part of the model SGLang's arguments start, over all replicas.

    >>> ranks_of(["--tp-size", "2", "--dp-size=3", "--log-level", "info"])
    6
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for names in (("--tp-size", "--tp", "--tensor-parallel-size"), ("--dp-size", "--dp", "--data-parallel-size")):
        parser.add_argument(*names, type=int, default=1)
    found, _ = parser.parse_known_args(list(arguments))
    return found.tp_size * found.dp_size


def cores_of(ranks: int) -> str:
    """Return the cores of each rank on a CPU as SGLang takes them; left to itself it has one rank for a NUMA node."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // ranks)
    own = ([cores[(rank * share + i) % len(cores)] for i in range(share)] for rank in range(ranks))
    return "|".join(",".join(map(str, each)) for each in own)
