"""A learner's book of the engines that connect to it: what each serves, was sent, loaded or refused."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from aurora_rl.collectors.codec import CodecError, field
from aurora_rl.telemetry.throttle import Throttle

_MAX_ENGINES = 256  # the least recently seen is forgotten; one that still lives introduces itself again within a second
_FORGET_S = 60.0  # an engine is forgotten after so many seconds of silence
_ANSWER_S = 600.0  # most seconds to wait for the other engines after one rejects a version
# An engine may serve what an earlier learner published. A version so far above that is not believed: the next one to be
# published must be above all of them.
_MAX_LEAD = 1 << 32
_REMEMBERED_CHECKSUMS = 64
_DIGITS = 32  # longest checksum kept from an engine's message, in characters


@dataclass(slots=True)
class EngineStatus:
    """What the learner knows of the engine of one connection; times are `time.monotonic` seconds."""

    name: str
    serving: int
    last_seen: float
    acknowledged: int | None = None  # newest version whose checksum, after loading, was the published one
    swap_ms: float | None = None
    # Last version that was refused or loaded wrong, None if the message could not be read, with the reason.
    rejected: tuple[int | None, str] | None = None
    rejected_at: float = 0.0
    offered: int | None = None
    first_offered: int | None = None  # first version that was sent over this connection
    taken: int = 0  # number of weights of an earlier learner that it may serve next
    in_flight: bool = False
    checksum: str | None = None  # of the weights that it serves, as it says
    ahead: bool = False  # serves a newer version than it is to have, of an earlier learner, and ignores older ones
    # The version that it serves, below `first_offered`, if an earlier learner published other weights as this number.
    foreign: int | None = None

    def rejects(self, version: int) -> bool:
        """Return whether the engine has refused a version or rolled it back."""
        return self.rejected is not None and self.rejected[0] == version

    def reject(self, version: int | None, reason: str) -> None:
        """Note that the engine does not serve a version, and why."""
        if self.rejected != (version, reason):
            self.rejected, self.rejected_at = (version, reason), time.monotonic()


class EngineBook:
    """Keeps the status of every connection. What a peer says counts for its own connection, while that is heard.

    Any thread may call any method.
    """

    def __init__(self) -> None:
        self._changed, self._log = threading.Condition(), Throttle(logging.getLogger(__name__))
        self._engines: OrderedDict[bytes, EngineStatus] = OrderedDict()  # connection's identity -> status
        self._checksums: OrderedDict[int, str] = OrderedDict()  # an engine may acknowledge what is no longer the newest
        self._published = 0  # the newest, for whomever it is
        self._for_all, self._for_one = 0, dict[str, int]()  # versions to have; those of single engines by name
        self._withdrawn: int | None = None

    @property
    def engines(self) -> dict[str, EngineStatus]:
        """A copy of what is known, by engine name."""
        with self._changed:
            return {status.name: replace(status) for status in self._engines.values()}

    @property
    def next_version(self) -> int:
        """Above everything published and everything that an engine serves."""
        with self._changed:
            there = (max(status.serving, status.taken) for status in self._engines.values())
            return 1 + max([self._published, *there])

    @property
    def overtaken(self) -> bool:
        """Whether an engine needs what is served under a new number; see `WeightPublisher.overtaken`."""
        with self._changed:
            wanted = [(status, self._wanted(status.name)) for status in self._engines.values()]
            return any(
                (version < status.serving and not self._has(status, version))
                or version == status.foreign
                or (version == self._withdrawn and not status.rejects(version))
                for status, version in wanted
            )

    @property
    def wanted(self) -> set[int]:
        """Versions that some engine is to have."""
        with self._changed:
            return {self._for_all, *self._for_one.values()} - {self._withdrawn}

    def _wanted(self, name: str) -> int:
        return self._for_one.get(name, self._for_all)

    def _has(self, status: EngineStatus, version: int) -> bool:
        """Return whether an engine serves the weights of a version, under this or another number."""
        weights = self._checksums.get(version)
        return (
            weights is not None
            and status.acknowledged == status.serving
            and self._checksums.get(status.serving) == weights
        )

    def publish(self, version: int, checksum: str, engines: Collection[str] | None = None) -> None:
        """Note the newest weights, and the names of the engines that are to have them; None means all engines.

        Raises:
            ValueError: ``version`` is not larger than the last one.
        """
        with self._changed:
            if version <= self._published:
                raise ValueError(
                    f"version {version} is not newer than the published {self._published}; publish a larger one"
                )
            self._published = version
            if engines is None:
                self._for_all = version
                self._for_one.clear()
            else:
                here = {status.name for status in self._engines.values()}  # who went away gets what all get
                self._for_one = {name: number for name, number in self._for_one.items() if name in here}
                self._for_one |= dict.fromkeys(engines, version)
            self._checksums[version] = checksum
            wanted = self.wanted
            for old in [number for number in self._checksums if number not in wanted][:-_REMEMBERED_CHECKSUMS]:
                del self._checksums[old]

    def due(self) -> list[tuple[bytes, int]]:
        """Return the connections to send a version to now, each with it, and note that it is on its way to them."""
        with self._changed:
            found, oldest = [], time.monotonic() - _FORGET_S
            for identity, status in list(self._engines.items()):
                version = self._wanted(status.name)
                if status.last_seen < oldest:
                    del self._engines[identity]
                elif version == self._withdrawn:
                    continue
                elif not status.in_flight and version != status.offered and version > status.serving:
                    status.offered, status.in_flight = version, True
                    status.first_offered = status.first_offered or version
                    found.append((identity, version))
            return found

    def wait_ack(self, version: int, timeout: float, engines: int) -> bool:
        """Wait until so many engines have loaded a version or a newer one; see `WeightPublisher.wait_ack`."""

        def acknowledged() -> bool:
            there = {status.name for status in self._engines.values() if (status.acknowledged or 0) >= version}
            return len(there) >= engines

        def rejected() -> bool:
            return any(status.rejects(version) for status in self._engines.values())

        with self._changed:
            self._changed.wait_for(lambda: acknowledged() or rejected(), timeout)
            return acknowledged()

    def rejected_by(self, version: int) -> dict[str, str]:
        """Return why engines did not load a version, or rolled it back, by their names."""
        with self._changed:
            rejecting = [status for status in self._engines.values() if status.rejects(version)]
            return {status.name: status.rejected[1] for status in rejecting if status.rejected is not None}

    def withdraw(self, version: int) -> bool:
        """Withdraw a version that nobody serves; see `WeightPublisher.withdraw`."""
        with self._changed:
            weights, rejected_at, waits = self._checksums.get(version), list[float](), False
            for status in self._engines.values():
                wanted = self._wanted(status.name)
                if self._checksums.get(wanted) != weights:
                    continue  # on trial: other weights
                if status.rejects(wanted):
                    rejected_at.append(status.rejected_at)
                elif self._has(status, wanted):
                    return False
                else:
                    waits = True
            if not rejected_at or (waits and time.monotonic() < min(rejected_at) + _ANSWER_S):
                return False
            self._withdrawn = version
            return True

    def forget(self, identity: bytes) -> None:
        """Forget the engine of a connection."""
        with self._changed:
            self._engines.pop(identity, None)

    def note_serving(self, identity: bytes, name: str, meta: Mapping[str, Any]) -> None:
        """Note what the engine of a connection says that it serves.

        Raises:
            CodecError: A field is malformed, or the version cannot be one that was published.
        """
        version = self._served_version(meta)
        received = field(meta, "received", int, type(None))
        digest = _digest(meta, str, type(None))
        with self._changed:
            status = self._engines.setdefault(identity, EngineStatus(name, version, time.monotonic()))
            self._engines.move_to_end(identity)
            if len(self._engines) > _MAX_ENGINES:
                self._engines.popitem(last=False)
            status.name, status.serving, status.last_seen = name, version, time.monotonic()
            status.checksum = digest
            if received is not None and received == status.offered:
                status.in_flight = False
            wanted = self._wanted(name)
            same = digest is not None and digest == self._checksums.get(wanted) == self._checksums.get(version)
            ahead = 0 < wanted < version and not same
            if ahead and not status.ahead:
                self._log.warning(
                    "ahead",
                    "engine %r serves version %d, newer than the published %d, and ignores older ones;"
                    " publish next_version to reach it",
                    *(name, version, wanted),
                )
            status.ahead = ahead
        if digest is not None:  # repeats the last acknowledgement, in case that was lost with a connection
            self._note_loaded(identity, version, digest, None)

    def note_ack(self, identity: bytes, meta: Mapping[str, Any]) -> None:
        """Note that the engine of a connection has loaded a version; errors as of `note_serving`."""
        version, digest = self._served_version(meta), _digest(meta, str)
        self._note_loaded(identity, version, digest, float(field(meta, "swap_ms", float, int)))

    def note_nack(self, identity: bytes, meta: Mapping[str, Any]) -> None:
        """Note that the engine of a connection has refused a version; errors as of `note_serving`."""
        version, reason = field(meta, "version", int, type(None)), field(meta, "reason", str)[:500]
        with self._changed:
            if (status := self._engines.get(identity)) is None:
                return
            if version is None or version == status.offered:
                status.in_flight = False
            if "taken" in meta:  # it gets the same weights under a larger number; see the protocol in weights.py
                status.foreign, status.taken = version, self._served_version({"version": meta["taken"]})
                return
            status.reject(version, reason)
            self._changed.notify_all()
        self._log.warning("rejected", "engine %r rejected version %s: %r", status.name, version, reason)

    def _served_version(self, meta: Mapping[str, Any]) -> int:
        version: int = field(meta, "version", int)
        if not 0 <= version <= self._published + _MAX_LEAD:
            raise CodecError(f"an engine says that it serves version {version}, and {self._published} is published")
        return version

    def _note_loaded(self, identity: bytes, version: int, digest: str, swap_ms: float | None) -> None:
        with self._changed:
            if (status := self._engines.get(identity)) is None:
                return
            status.serving = version
            if version == status.offered:
                status.in_flight = False
            if swap_ms is not None:
                status.swap_ms = swap_ms
            published = self._checksums.get(version)
            if published is None:
                return  # from an earlier learner: nothing to compare with
            if digest == published:
                status.acknowledged = version
            elif version < (status.first_offered or version + 1):  # it was not sent that
                status.foreign = version
            else:
                reason = f"the loaded weights have checksum {digest}, the published ones {published}"
                if status.rejected != (version, reason):
                    self._log.warning("loaded", "engine %r did not load version %d: %s", status.name, version, reason)
                status.reject(version, reason)
            self._changed.notify_all()


def _digest(meta: Mapping[str, Any], *types: type) -> Any:
    """Return the checksum that an engine says, one of these types; CodecError if it is none."""
    digest = field(meta, "checksum", *types)
    if digest is not None and len(digest) > _DIGITS:
        raise CodecError(f"the field checksum has {len(digest)} characters, and a checksum {_DIGITS}")
    return digest
