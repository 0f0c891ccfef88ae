"""Session of an attached learner inside an engine: the ends of the wire, the assembler, the version."""

from __future__ import annotations

import logging
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from aurora_rl.collectors.codec import Limits, checksum
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.keys import engine_keys
from aurora_rl.collectors.sink import TrajectorySink
from aurora_rl.collectors.sockets import engine_name
from aurora_rl.collectors.weights import WeightReceiver
from aurora_rl.envs.remote.assembler import TargetRows, TrajectoryAssembler
from aurora_rl.envs.remote.copies import to_host
from aurora_rl.envs.remote.plugin_server import PluginError
from aurora_rl.remote_engines import keys_variable

logger = logging.getLogger(__name__)

_TOLD_SWAPS, _TOLD_FAULTS = 256, 32

ATTACH: dict[str, type | tuple[type, ...]] = {
    "trajectories": str,  # address of the learner's collector
    "weights": str,  # address of its publisher
    "keys": bool,  # whether they have keys
    "handshake": dict,
    "version": int,  # version of the weights that the server was started with
    "capture_rate": (int, float),  # share of requests to capture
    "queue": int,  # trajectories that wait for an absent learner
    "queue_bytes": int,  # most bytes of queued trajectories
    "max_age": (int, float),  # seconds that they may wait; 0 knows no limit
    "max_message": int,  # bytes of a trajectory or of weights on the wire
    "top_k": int,  # recorded entries of the target's distribution if the head's input is out of reach
    "max_bytes": int,  # most bytes that unfinished requests hold
    "store_bytes": int,  # most bytes of features kept for prompts with a cached prefix
    "part_tokens": int,  # tokens of an answer after which a part of it is sent; 0 sends whole requests
}
"""Fields of an ``attach`` request and their types."""


class SwapError(ValueError):
    """Weights that an engine did not take; the message says which and why."""


class Session:
    """From ``attach`` to ``detach``: the ends of the wire, the assembler, and the version that drafts.

    Args:
        fields: Fields of the request; see :data:`ATTACH`.
        engine: Name of the engine, for messages.
        keys: Folder of this engine's keys; None if it has none.
        exact: Whether every round shows what the target's head reads, which CUDA graphs hide.

    Raises:
        PluginError: A field is missing, unknown or of the wrong type.
        WireKeyError: A key cannot be used.
        OSError: An address is malformed.

    Attributes:
        id: Name of the session, which no other has.
    """

    def __init__(self, fields: dict[str, Any], *, engine: str, exact: bool, keys: str | None = None) -> None:
        for name, kind in ATTACH.items():
            if not isinstance(fields.get(name), kind):
                types = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
                raise PluginError(f"attach needs {name} of type {types}, got {fields.get(name)!r}")
        if unknown := set(fields) - set(ATTACH):
            raise PluginError(f"attach knows no {sorted(unknown)}; it knows {sorted(ATTACH)}")
        if not 0 <= fields["capture_rate"] <= 1:
            raise PluginError(f"capture_rate must lie in [0, 1], got {fields['capture_rate']}")
        if fields["part_tokens"] < 0:
            raise PluginError(f"part_tokens must be 0, for whole requests, or more, got {fields['part_tokens']}")
        if fields["keys"] != (keys is not None):
            has, lacks = ("learner", "engine") if keys is None else ("engine", "learner")
            raise PluginError(
                f"the {has} has keys and the {lacks} has none; set wire.keys there, and {keys_variable(engine)} in the "
                f"environment of {engine}, or neither"
            )
        self.handshake = Handshake.from_meta(fields["handshake"])
        self.capture_rate, self.top_k = float(fields["capture_rate"]), fields["top_k"]
        self.id, self.recording, self.error = secrets.token_hex(8), True, ""
        self.exact, self.version = exact, fields["version"]
        own = None if keys is None else engine_keys(keys)
        wire: dict[str, Any] = {
            "handshake": self.handshake,
            "keys": own,
            "name": engine_name(own),
            "limits": Limits(max_bytes=fields["max_message"]),
        }
        queue = {"capacity": fields["queue"], "max_bytes": fields["queue_bytes"], "max_age": fields["max_age"] or None}
        self.sink = TrajectorySink(fields["trajectories"], **wire, **queue)
        self.receiver = WeightReceiver(fields["weights"], **wire, version=self.version)
        memory = {name: fields[name] for name in ("max_bytes", "store_bytes")}
        self.assembler = TrajectoryAssembler(self.sink.extend, **memory, part_tokens=fields["part_tokens"] or None)
        self.swap_ms: list[float] = []
        self.faults: list[dict[str, Any]] = []
        self._digests: dict[int, str] = {}  # checksums of the versions loaded here
        self.flush_due = True  # texts in the prefix cache have no features here
        self.background = ThreadPoolExecutor(1, thread_name_prefix="acknowledge")

    def status(self) -> dict[str, Any]:
        """Return the session's part of the plugin's status."""
        counts, served = dict(self.assembler.counts), self.assembler.totals
        return {
            "recording": self.recording,
            "error": self.error,
            "recorded": counts.pop("recorded", 0),
            "skipped": counts,
            "served": asdict(served) | {"acceptance_length": served.acceptance_length},
            "queued": self.sink.queued,
            "drops": dict(self.sink.drops),
            "sent": self.sink.sent,
            "version": self.version,
            "refused": self.receiver.error,
            "swaps": len(self.swap_ms),
            "swap_ms": self.swap_ms[-_TOLD_SWAPS:],
            "faults": self.faults[-_TOLD_FAULTS:],
        }

    def delete(self, tenant: str) -> dict[str, Any]:
        """Drop what is kept of a tenant's requests that have begun, tell the learner, and say what became of it."""
        self.assembler.delete(tenant)
        dropped, self.flush_due = self.sink.delete(tenant), True  # the prefix cache is not kept by tenant
        return {"trajectories": dropped, "learner": "told" if self.sink.connected else "absent"}

    def acknowledge(self, version: int, weights: dict[str, Tensor], milliseconds: float) -> None:
        """Tell the learner that a version serves now, after a swap of so many milliseconds.

        It gets the checksum of the tensors as they came, by checkpoint names.
        """
        digest = self._digests[version] = checksum(weights)
        self.receiver.acknowledge(version, digest, milliseconds)

    def roll_back(self, version: int, before: int, reason: str) -> None:
        """Tell the learner that a version serves no more, and which one does again."""
        self.version = before
        self.receiver.reject(version, reason)
        if before in self._digests:
            self.receiver.acknowledge(before, self._digests[before], 0.0)
        else:  # the weights served when the learner attached
            self.receiver.go_back(before)

    def note_fault(self, **fault: Any) -> None:
        """Add a fault of the drafter to the status, with its number."""
        number = self.faults[-1]["number"] + 1 if self.faults else 1
        self.faults = [*self.faults[-_TOLD_FAULTS:], {"number": number, **fault}]

    def fail(self, reason: str) -> None:
        """Switch recording off; serving goes on."""
        logger.warning("recording is off: %s", reason)
        self.recording, self.error = False, reason

    def target_rows(self, hidden: Tensor | None, logits: Tensor) -> TargetRows | None:
        """Return the target's distribution at some positions, in the form that this session can always have.

        Args:
            hidden: What the target's head reads there, ``[n, H]``; None if it cannot be reached.
            logits: What the head gives there, ``[n, V]``.

        Returns:
            Of an exact session ``hidden`` ``[n, H]``, or None if it was not reached. Of others the ``k`` likeliest
            tokens, ``topk_ids`` ``[n, k]`` int64 and ``topk_log_probs`` ``[n, k]`` float32 (nats), and
            ``tail_log_prob`` ``[n]`` float32 of all other tokens together. All are on the CPU.
        """
        if self.exact:
            return None if hidden is None else {"hidden": to_host(hidden)}
        log_probs = logits.log_softmax(-1, dtype=torch.float32)
        best, ids = log_probs.topk(min(self.top_k, log_probs.shape[-1]))
        tail = torch.log1p(-best.exp().sum(-1).clamp(max=1.0))
        return {"topk_ids": to_host(ids), "topk_log_probs": to_host(best), "tail_log_prob": to_host(tail)}

    def close(self) -> None:
        """Send what can be sent and end."""
        self.assembler.close()
        self.background.shutdown()
        self.sink.close(2.0)
        self.receiver.close()


@dataclass(slots=True)
class Follower:
    """Stands in for a session on all ranks of a server but the first, which reports their faults."""

    version: int
    flush_due: bool = False  # the first rank decides when the prefix cache is emptied

    def roll_back(self, version: int, before: int, reason: str) -> None:
        """Note that an earlier version serves again."""
        self.version = before

    def note_fault(self, **fault: Any) -> None:
        """Say nothing of a fault."""
