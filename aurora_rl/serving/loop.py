"""The thread in which a server serves, round by round, so that nothing else delays a round."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

# An idle server looks so often whether new weights have come.
_IDLE_S = 0.1


class ServingLoop:
    """Call ``step`` again and again in a thread of its own.

    Args:
        step: Serves for a moment. Returns False where there was nothing to do.
        done: Asked when there is nothing to do; True ends the loop. By default it waits for more.
        on_end: Called in the thread when it ends, with the error that ended it; None if none did.

    Attributes:
        error: The error that ended the loop; None while it runs, or if none did.

    Example:
        >>> steps = iter([True, True, False])
        >>> loop = ServingLoop(lambda: next(steps), done=lambda: True)
        >>> loop.start()
        >>> loop.stop(timeout=5.0)
        >>> next(steps, "all taken"), loop.alive, loop.error
        ('all taken', False, None)
    """

    def __init__(
        self,
        step: Callable[[], bool],
        *,
        done: Callable[[], bool] = lambda: False,
        on_end: Callable[[BaseException | None], None] = lambda error: None,
    ) -> None:
        self._step, self._done, self._on_end = step, done, on_end
        self._wake, self._stopping = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="serving", daemon=True)
        self.error: BaseException | None = None

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def wake(self) -> None:
        """There is something to do again."""
        self._wake.set()

    @property
    def alive(self) -> bool:
        """Whether the thread serves."""
        return self._thread.is_alive()

    def stop(self, timeout: float | None = None) -> None:
        """End the loop after the step that runs, and wait for that, in seconds."""
        self._stopping = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._wake.clear()
                if not self._step():
                    if self._done():
                        break
                    self._wake.wait(_IDLE_S)
        except BaseException as error:
            logger.debug("serving has ended", exc_info=True)
            self.error = error
        self._on_end(self.error)
