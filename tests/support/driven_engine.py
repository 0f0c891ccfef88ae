"""A thread that drives the rounds of an AsyncEngine, as the command line does."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from aurora_rl.serving.async_engine import AsyncEngine
from aurora_rl.serving.server import InferenceServer


@contextlib.contextmanager
def driven(engine: AsyncEngine, server: InferenceServer) -> Iterator[None]:
    """Serve in a thread while the block runs."""
    engine.attach(server)
    stop = threading.Event()

    def rounds() -> None:
        try:
            while not stop.is_set():
                if not engine.step():
                    engine.wait(0.05)
        except BaseException as error:
            engine.end(f"the engine has ended: {error!r}")
        else:
            engine.end("the server is shutting down")

    thread = threading.Thread(target=rounds, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()
