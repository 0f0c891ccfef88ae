"""The data-parallel replicas of a server from outside: each has a plugin that records and loads for itself.

The plugin of the first answers at the server's plugin address, those of the others at the ports
after it, or at the paths that end in their number.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest
from typing import Any

from aurora_rl.collectors.keys import ClientKeys
from aurora_rl.envs.remote.plugin_server import PluginError, ask, replica_address

_ATTACH_S = 90.0


def ask_all(
    address: str, kind: str, fields: dict[str, Any] | None = None, *, engine: str, keys: ClientKeys | None = None
) -> dict[str, Any]:
    """Send a request to the plugins of all replicas and return the status of the server.

    Arguments are those of :func:`~aurora_rl.envs.remote.plugin_server.ask`, with the address of the first replica's.

    Raises:
        PluginError: A plugin refuses or does not answer. If one refuses to be attached, none is.
    """
    options: dict[str, Any] = {"engine": engine, "keys": keys}
    if kind == "attach":  # the head of a target on several GPUs is brought together first
        options["timeout"] = _ATTACH_S
    first = ask(address, kind, fields, **options)
    statuses, faults = [first], list[str]()
    for number in range(1, first.get("dp_size", 1)):
        try:
            statuses.append(ask(replica_address(address, number), kind, fields, **options))
        except PluginError as error:  # the others are asked all the same: one must not keep a deletion from them
            faults.append(f"replica {number} of {first['dp_size']}: {error}")
            if kind == "attach":
                break
    if faults and kind == "attach":
        for number in range(len(statuses)):
            with contextlib.suppress(PluginError):
                ask(replica_address(address, number), "detach", engine=engine, keys=keys)
    if faults:
        raise PluginError("; ".join(faults))
    return status_of_all(statuses)


def status_of_all(statuses: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the status of a server by those of its replicas: sums, and for the version the oldest that serves.

    A fault keeps the number that its replica gave it, and gets the number of the "replica".

    Example:
        >>> shared = {"attached": True, "seen": {"verify": 2}, "slots": 4}
        >>> both = status_of_all([{**shared, "session": "a", "version": 3}, {**shared, "session": "b", "version": 2}])
        >>> both["session"], both["version"], both["seen"], both["slots"]
        ('a+b', 2, {'verify': 4}, 8)
    """
    if len(statuses) == 1:
        return statuses[0]
    # One replica may be detached, whose status has less.
    whole = {name: value for each in reversed(statuses) for name, value in each.items()}
    for name in whole.keys() & _COMBINED.keys():
        whole[name] = _COMBINED[name]([each[name] for each in statuses if name in each])
    for name in whole.keys() & {"error", "refused"}:
        whole[name] = "; ".join(f"replica {i}: {each[name]}" for i, each in enumerate(statuses) if each.get(name))
    for name in whole.keys() & {"faults", "ranks"}:
        whole[name] = [{"replica": i, **entry} for i, each in enumerate(statuses) for entry in each.get(name, [])]
    return whole


def _in_turns(times: Sequence[Sequence[float]]) -> list[float]:
    """Return the times of all replicas, the latest last."""
    return [ms for ms in chain(*zip_longest(*map(reversed, times))) if ms is not None][::-1]


def _deleted(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    told = all(part["learner"] == "told" for part in parts)
    return {"trajectories": sum(part["trajectories"] for part in parts), "learner": "told" if told else "absent"}


def _served(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the sums over recorded requests of all replicas."""
    accepted = sum((Counter(part["accepted"]) for part in parts), Counter[str]())
    sums: dict[str, Any] = {
        name: sum(part[name] for part in parts) for name in parts[0] if name not in ("accepted", "acceptance_length")
    }
    rounds = sums["speculative_rounds"]
    return sums | {
        "accepted": dict(accepted),
        "acceptance_length": sums["speculative_tokens"] / rounds if rounds else None,
    }


_COMBINED: dict[str, Callable[[list[Any]], Any]] = {
    "attached": all,
    "session": lambda sessions: "+".join(sessions) if all(sessions) else "",
    **dict.fromkeys(("slots", "recorded", "queued", "sent", "swaps"), sum),
    **dict.fromkeys(("seen", "skipped", "drops"), lambda counts: dict(sum(map(Counter, counts), Counter()))),
    "version": min,
    "served": _served,
    "swap_ms": _in_turns,
    "deleted": _deleted,
}
