"""An answer of SGLang on its way to a client: timed, and with what became of its drafts in vLLM's words."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from aurora_rl.serving.http.bodies import draft_metrics
from aurora_rl.serving.request_times import RequestTimes, Wait

_ASKED, _TOLD = "return_spec_tokens_details", "spec_tokens_details"  # fields of SGLang's requests and answers


class SGLangAnswer:
    """The answer to one request, which begins when the object is made.

    ``observe`` is called with what the client has waited for, and for how many seconds.

    Attributes:
        fields: Fields that SGLang gets, by which it is asked what became of the drafts.

    Example:
        >>> answer = SGLangAnswer({"n": 1}, observe=print, num_spec_tokens=3, drafter_version=lambda: 0)
        >>> answer.fields
        {'n': 1, 'return_spec_tokens_details': True}
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        *,
        observe: Callable[[Wait, float], None],
        num_spec_tokens: int,
        drafter_version: Callable[[], int],
    ) -> None:
        self._num_spec_tokens, self._drafter_version = num_spec_tokens, drafter_version
        self._times = RequestTimes(observe)
        self._times.scheduled = None  # SGLang does not say
        n, prompt = fields.get("n") or 1, fields.get("prompt")
        several = isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)
        self._single, self._begun = n == 1 and not several, False
        self._keeps = fields.get(_ASKED) is True  # the client itself wants SGLang's words
        # Of several prompts with one choice each SGLang tells about the first alone.
        self.fields = dict(fields) if several and n == 1 else {**fields, _ASKED: True}
        self._details: list[dict[str, Any]] = []
        self._part = b""  # an incomplete event
        self._held: tuple[bytes, dict[str, Any]] | None = None  # an event that may be the last

    def whole(self, content: bytes) -> bytes:
        """Return the body of an answer that is not streamed."""
        self._times.completed()
        body = _object(content)
        if body is None or not self._take_details(body):
            return content
        return json.dumps({**body, "metrics": self._metrics()}).encode()

    def feed(self, piece: bytes) -> bytes:
        """Take a piece of a stream. Return the events that the client gets now."""
        *events, self._part = (self._part + piece).split(b"\n\n")
        return b"".join(self._passed(each + b"\n\n") for each in events)

    def end(self) -> bytes:
        """Return what was held back, when the stream has ended, however it did."""
        held, self._held = self._held, None
        return b"" if held is None else held[0]

    def completed(self) -> None:
        """Note that the stream came to its end."""
        # SGLang's length is that of the completion over the passes; the first token came before them.
        tokens = sum(round(each.get("spec_accept_length", 0) * each.get("spec_verify_ct", 0)) for each in self._details)
        self._times.completed(tokens - 1 if self._single and tokens else 0)

    def _passed(self, event: bytes) -> bytes:
        body = _object(event.removeprefix(b"data: "))
        if body is None:  # the end, or a comment
            if self._held is not None and self._details:
                self._held = _event({**self._held[1], "metrics": self._metrics()}), {}
            return self.end() + event
        choices = body.get("choices")
        if self._take_details(body):
            if not choices and "sglext" not in body:
                return b""  # an event without a choice: clients that did not ask for one stumble over it
            event = _event(body)
        before = self.end()
        if any(map(_says_something, choices or [])) and (self._single or not self._begun):
            self._begun = True
            self._times.delivered(0)
        if choices == [] or any(choice.get("finish_reason") for choice in choices or []):
            self._held = event, body
            return before
        return before + event

    def _take_details(self, body: dict[str, Any]) -> bool:
        """Take what SGLang says of the drafts out of a body. Return False if it says nothing."""
        extension = body.get("sglext") or {}
        if not (told := extension.get(_TOLD)):
            return False
        self._details = told if isinstance(told, list) else [told]
        if not self._keeps:
            del extension[_TOLD]
            if not extension:
                del body["sglext"]
        return True

    def _metrics(self) -> dict[str, Any]:
        return draft_metrics(
            [each.get("spec_correct_drafts_histogram", []) for each in self._details],
            num_drafted=sum(each.get("spec_num_proposed_drafts", 0) for each in self._details),
            num_spec_tokens=self._num_spec_tokens,
            drafter_version=self._drafter_version(),
        )


def _object(text: bytes) -> dict[str, Any] | None:
    """Return a JSON object; None for anything else."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def _says_something(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(choice.get("text") or any(value for name, value in delta.items() if name != "role"))
