"""The answers of a run: one JSON object for each completed request, as it ends."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from aurora_rl.envs import Completion
from aurora_rl.serving.requests import RequestQueue
from aurora_rl.telemetry.log import JsonLines


class Answers(JsonLines):
    """Append each completion to ``answers.jsonl``, next to noting it in its conversation.

    Args:
        path: File; see :class:`JsonLines`.
        requests: RequestQueue that the completions belong to.
        tokenizer: Tokenizer of the target.
    """

    def __init__(self, path: Path, requests: RequestQueue, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(path)
        self._requests, self._tokenizer = requests, tokenizer

    def completed(self, completion: Completion) -> str:
        """Write the completion, note it in its conversation, and return the conversation's domain."""
        prompt, turn = self._requests.asked(completion.request.id)
        self.append(
            request=completion.request.id,
            prompt=prompt.id,
            domain=prompt.domain,
            turn=turn + 1,
            text=str(self._tokenizer.decode(completion.tokens, skip_special_tokens=True)),
            finish_reason="stop" if completion.terminated else "length",
            tokens=len(completion.tokens),
        )
        return self._requests.completed(completion)
