"""From bodies of requests to an engine's input: token ids and sampling parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from aurora_rl.envs import SamplingParams
from aurora_rl.models.loading import encode_chat
from aurora_rl.serving.async_engine import Job
from aurora_rl.serving.http.errors import ApiError
from aurora_rl.serving.http.schemas import ChatCompletionBody, CompletionBody, Detokenize, Generation, Tokenize
from aurora_rl.tenants import TENANT_HEADER, check_tenant
from aurora_rl.workload.request_fields import FieldError
from aurora_rl.workload.request_values import ChatMessage

_SWITCHES = {"true": True, "1": True, "false": False, "0": False}


class Encoder:
    """Turn bodies into jobs; what cannot be served is refused with the reason.

    Arguments are those of :class:`~aurora_rl.serving.http.front.Front`. A request has at most ``max_waiting`` choices,
    as many as may wait for a slot.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        model: str,
        vocab_size: int,
        max_length: int,
        max_waiting: int,
        sampling_params: SamplingParams,
        max_tokens: int | None = None,
    ) -> None:
        self._tokenizer, self._model = tokenizer, model
        self._sampling_params, self._max_tokens = sampling_params, max_tokens
        self._vocab_size, self._max_length, self._max_waiting = vocab_size, max_length, max_waiting
        # Texts that no tokens of the vocabulary could bring into the context are refused before seconds go into them.
        self._max_characters = max_length * max(map(len, tokenizer.get_vocab()))

    def jobs(self, body: ChatCompletionBody | CompletionBody, headers: Mapping[str, str]) -> list[Job]:
        """Return a job for each choice: those of the first prompt, then those of the next.

        Raises:
            ApiError: Status 404 for another model.
            FieldError: What cannot be served.
        """
        self.check_model(body.model)
        n, prompts = body.n, 1 if isinstance(body, ChatCompletionBody) else len(body.prompts)
        if n * prompts > self._max_waiting:
            what = f"{prompts} prompts of n={n} choices are" if prompts > 1 else f"n={n} choices are"
            raise FieldError(
                f"{what} more than http.max_waiting={self._max_waiting} completions; send fewer at a time",
                "prompt" if prompts > 1 else "n",
            )
        speculative = switch(body.speculative, headers, "x-aurora-speculative")
        learn, tenant = switch(body.learn, headers, "x-aurora-learn"), tenant_of(headers)
        jobs = []
        for tokens in self._prompts(body):
            sampling, prompt = self._params(body, len(tokens)), torch.tensor(tokens, dtype=torch.int64)
            for sampled in replace(sampling, n=n, seed=body.sampling.get("seed")).copies():
                jobs.append(Job(prompt, sampled, speculative, learn, cache_salt=body.cache_salt, tenant=tenant))
        return jobs

    def tokenize(self, body: Tokenize) -> list[int]:
        """Return the tokens of a text or a conversation."""
        self.check_model(body.model)
        if body.messages is not None:
            return self._chat(body.messages)
        return list(self._tokenizer(body.prompt, add_special_tokens=body.add_special_tokens)["input_ids"])

    def detokenize(self, body: Detokenize) -> str:
        """Return the text of tokens, special ones included."""
        self.check_model(body.model)
        self._check_vocab(body.tokens, "tokens")
        return str(self._tokenizer.decode(body.tokens, clean_up_tokenization_spaces=False))

    def token_strings(self, tokens: Sequence[int]) -> list[str]:
        """Return tokens as the vocabulary writes them."""
        return [str(each) for each in self._tokenizer.convert_ids_to_tokens(list(tokens))]

    def check_model(self, model: str | None) -> None:
        """Raise ApiError with status 404 where a request names a model that is not served."""
        if model is not None and model != self._model:
            message = f"the model {model[:200]!r} does not exist; this server serves {self._model!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _prompts(self, body: ChatCompletionBody | CompletionBody) -> Iterator[list[int]]:
        """Yield the prompts one by one: the caller may refuse one before work goes into the next."""
        if isinstance(body, ChatCompletionBody):
            if len(body.messages) > self._max_length:  # empty ones have tokens too, of the template
                raise FieldError(
                    f"the context holds {self._max_length} tokens, fewer than there are messages "
                    f"({len(body.messages)}); send fewer",
                    "messages",
                    "context_length_exceeded",
                )
            self._check_length(
                sum(len(each["content"]) + len(each.get("name", "")) for each in body.messages), "messages"
            )
            yield self._checked(self._chat(body.messages), "messages")
            return
        for each in body.prompts:
            yield self._checked(self._text(each) if isinstance(each, str) else each, "prompt")

    def _text(self, text: str) -> list[int]:
        self._check_length(len(text), "prompt")
        return list(self._tokenizer(text)["input_ids"])

    def _check_length(self, characters: int, param: str) -> None:
        if characters > self._max_characters:
            raise FieldError(
                f"the context holds {self._max_length} tokens, and no {self._max_length} tokens make up a prompt of "
                f"{characters} characters; shorten it",
                param,
                "context_length_exceeded",
            )

    def _chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        try:
            return encode_chat(self._tokenizer, messages)
        except Exception as error:  # a template is a program of the model's, which may fail in any way
            reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            message = f"the chat template of model {self._model!r} refuses the conversation: {reason}"
            raise FieldError(message, "messages") from error

    def _checked(self, tokens: list[int], param: str) -> list[int]:
        if not tokens:
            raise FieldError("the prompt has no tokens; say something in it", param)
        self._check_vocab(tokens, param)
        return tokens

    def _check_vocab(self, tokens: Sequence[int], param: str) -> None:
        outside = next((token for token in tokens if not 0 <= token < self._vocab_size), None)
        if outside is not None:
            raise FieldError(
                f"token {outside} is outside of the model's vocabulary, 0..{self._vocab_size - 1}; send ids that "
                "/tokenize gives",
                param,
            )

    def _params(self, body: Generation, prompt_length: int) -> SamplingParams:
        """Return the parameters of a request, without its seed; raise if the context has no room for its budget."""
        budget, name, room = body.sampling.get("max_tokens"), body.budget_name, self._max_length - prompt_length
        if room < (budget or 1):
            asked = "" if budget is None else f" and {name}={budget} asks for that many more"
            raise FieldError(
                f"the context holds {self._max_length} tokens: the prompt has {prompt_length}{asked}; shorten the "
                f"prompt{'' if budget is None else f' or lower {name}'}",
                "messages" if isinstance(body, ChatCompletionBody) else "prompt",
                "context_length_exceeded",
            )
        unnamed = body.default_budget if self._max_tokens is None else self._max_tokens
        return replace(self._sampling_params, **{"max_tokens": min(room, unnamed or room), **body.sampling})


def switch(value: bool | None, headers: Mapping[str, str], name: str) -> bool:
    """Return the value of a switch in the body, or else in the header ``name``, or else true."""
    if value is not None:
        return value
    text = headers.get(name, "true").strip().lower()
    if text not in _SWITCHES:
        raise ApiError(400, f"the header {name} is {text[:50]!r}; give true or false", code="invalid_value")
    return _SWITCHES[text]


def tenant_of(headers: Mapping[str, str]) -> str | None:
    """Return the tenant in a request's headers (by lower-case name), None if it names none.

    Raises:
        ApiError: Status 400, for a name that is none.
    """
    names = [value for name, value in headers.items() if name == TENANT_HEADER.lower()]
    if len(names) > 1:  # a gateway's and, before it, what its client sent
        message = f"the header {TENANT_HEADER} is there {len(names)} times; send it once"
        raise ApiError(400, message, code="invalid_value")
    try:
        return check_tenant(names[0]) if names else None
    except ValueError as error:
        raise ApiError(400, f"the header {TENANT_HEADER}: {error}", code="invalid_value") from error


def tenant_to_delete(headers: Mapping[str, str]) -> str:
    """Return the tenant whose data a request deletes; arguments and errors are those of :func:`tenant_of`."""
    if (tenant := tenant_of(headers)) is None:
        raise ApiError(400, f"whose data is to be deleted? name the tenant in the header {TENANT_HEADER}")
    return tenant
