"""Clients of a server that a test has started: they ask, and notice an answer that fails or changes."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
from processes import wait


def client(server: Any) -> openai.OpenAI:
    """A client of a server that has started."""
    found: list[str] = []

    def listens() -> bool:
        assert server.process.poll() is None, server.text
        found[:] = re.findall(r"listening at (\S+)", server.text)
        return bool(found)

    wait(listens, 120)
    return openai.OpenAI(base_url=found[0], api_key="none", timeout=60, max_retries=0)


def ask(api: openai.OpenAI, text: str, **options: Any) -> Any:
    return api.chat.completions.create(
        model=api.models.list().data[0].id, messages=[{"role": "user", "content": text}], **options
    )


def ask_until(server: Any, api: openai.OpenAI, happened: Callable[[], object], limit: int = 600) -> int:
    """Ask, four at a time, until something has happened; return how often."""
    with ThreadPoolExecutor(4) as pool:
        for asked in range(0, limit, 4):
            if happened():
                return asked
            answers = pool.map(lambda number: ask(api, f"Number {number}?", max_tokens=8), range(asked, asked + 4))
            assert all(answer.usage.completion_tokens == 8 for answer in answers)
            assert server.process.poll() is None, server.text
    raise AssertionError("it did not happen in time")


class Asker:
    """Asks the same few questions, again and again, in a thread, as a context; leaving it checks every answer.

    Attributes:
        answered: Number of answers so far.
    """

    def __init__(self, api: openai.OpenAI) -> None:
        self._api, self._texts, self._faults = api, {}, []  # type: ignore[var-annotated]
        self._done = threading.Event()
        self.answered = 0
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def _ask(self) -> None:
        while not self._done.is_set():
            question = f"Number {self.answered % 5}?"
            try:
                text = ask(self._api, question, max_tokens=8).choices[0].message.content
            except openai.OpenAIError as error:
                self._faults.append(f"{question} failed: {error!r}")
                return
            if self._texts.setdefault(question, text) != text:
                self._faults.append(f"{question} was answered {self._texts[question]!r}, then {text!r}")
            self.answered += 1

    def __enter__(self) -> Asker:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join(60)
        assert not self._faults and self.answered > 5, self._faults

    def more(self) -> None:
        """Wait for a few answers to questions that are asked from now on."""
        before = self.answered
        wait(lambda: self._faults or self.answered >= before + 4)
