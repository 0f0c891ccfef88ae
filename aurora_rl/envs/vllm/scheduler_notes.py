"""Notes of vLLM's scheduler to the worker with each batch, which vLLM itself does not send: ends and salts of requests.

Both may be processes of their own. So the notes travel as an attribute of the scheduler's output, which is pickled as
it is. The worker's wish for an empty prefix cache travels as an attribute of the runner's output.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from aurora_rl.envs.vllm.hooking import wrap

logger = logging.getLogger(__name__)

NOTES = "aurora_rl_notes"
"""Attribute of the scheduler's output with its :class:`Notes`."""
FLUSH = "aurora_rl_flush"
"""Attribute of the runner's output: whether the prefix cache is to be emptied once no request runs."""


class Ended(NamedTuple):
    """How a request ended: the tokens of its completion, and the name of vLLM's status."""

    tokens: list[int]
    status: str


@dataclass(frozen=True)
class Notes:
    """The scheduler's notes to the worker on a batch.

    vLLM logs a batch whose pass fails, part by part, and parts with users' data by their :meth:`anon_repr`.
    """

    ended: dict[str, Ended]  # how requests ended that are finished, by id
    salts: dict[str, str | None]  # of the requests that begin, by id; None where a request has none
    flushed: bool  # whether the prefix cache was emptied just before this batch

    def anon_repr(self) -> str:
        """Return counts, without tokens and salts."""
        return f"Notes(ended={len(self.ended)}, begun={len(self.salts)}, flushed={self.flushed})"


class SchedulerNotes:
    """Takes the notes of one scheduler's process."""

    def __init__(self) -> None:
        self._ended: dict[str, Ended] = {}
        self._flush = False

    def on_class(self, original: Callable, config: Any) -> Any:
        """Return the class of the scheduler, with hooks around its methods."""
        scheduler = original(config)
        wrap(scheduler, "schedule", self.schedule)
        wrap(scheduler, "update_from_output", self.update)
        wrap(scheduler, "_free_request", self.free)
        return scheduler

    def free(self, original: Callable, scheduler: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        """Note how a request ended."""
        try:
            self._ended[request.request_id] = Ended(list(request.output_token_ids), request.status.name)
        except Exception:  # a fault of ours must not reach the engine; the request is counted as incomplete
            logger.exception("the end of a request is not noted")
        return original(scheduler, request, *args, **kwargs)

    def schedule(self, original: Callable, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        """Empty the prefix cache if that was asked for, and write the notes on the batch."""
        flushed = self._flushed(scheduler)
        batch = original(scheduler, *args, **kwargs)
        try:
            ended = {rid: self._ended.pop(rid) for rid in batch.finished_req_ids if rid in self._ended}
            salts = {new.req_id: scheduler.requests[new.req_id].cache_salt for new in batch.scheduled_new_reqs}
            setattr(batch, NOTES, Notes(ended, salts, flushed))
        except Exception:
            logger.exception("a batch has no notes")
        return batch

    def update(self, original: Callable, scheduler: Any, batch: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        """Take the worker's wish."""
        self._flush = self._flush or bool(getattr(output, FLUSH, False))
        return original(scheduler, batch, output, *args, **kwargs)

    def _flushed(self, scheduler: Any) -> bool:
        try:
            if self._flush and not scheduler.running and scheduler.reset_prefix_cache():
                self._flush = False
                return True
        except Exception:
            logger.exception("the prefix cache is not emptied")
        return False
