"""A language model with a drafter: text in, text out, decoded speculatively."""

from __future__ import annotations

import logging
import os
import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch

from aurora_rl.envs import Completion, Engine, Request, SamplingParams, generation_processors
from aurora_rl.llm_prompts import PromptType, encode_prompt, prompts_with_params
from aurora_rl.models.detokenizer import Detokenizer, detokenize
from aurora_rl.models.loading import default_dtype, load_target, stop_token_ids, usable_device
from aurora_rl.models.target_head import context_length
from aurora_rl.objectives import SumLoss, make_objectives
from aurora_rl.policies import Drafter, TargetParts, TreeShape, get_drafter
from aurora_rl.policies.calibration import DrafterError
from aurora_rl.policies.decoder import SpeculativeDecoder
from aurora_rl.policies.formats.files import load_drafter, naming_drafters, written
from aurora_rl.policies.lookup import NgramDrafter
from aurora_rl.policies.registry import names_drafter, start_untrained
from aurora_rl.policies.tree_shape import USUAL_LOOKUP
from aurora_rl.training.optimizers import drafter_optimizers
from aurora_rl.training.steps import train_on

logger = logging.getLogger(__name__)

_TIMED = (16, 128)  # tokens of the prompt, and of its completion, whose rounds are timed


@dataclass(frozen=True, slots=True)
class Chunk:
    """Text and tokens that one round added to one completion.

    Attributes:
        index: Place of the completion in what :meth:`LLM.generate` returns: that of its prompt, if no ``n`` is above 1.
        text: New text. It may come after its tokens: incomplete characters and beginnings of stop strings wait.
        tokens: New token ids.
        completion: The whole completion, in its last chunk; None before.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from aurora_rl.testing import tiny_folder
        >>> with TemporaryDirectory() as folder:
        ...     llm = LLM(tiny_folder(folder), device="cpu")
        >>> chunks = list(llm.stream("Once upon a time", SamplingParams(max_tokens=8)))
        >>> "".join(chunk.text for chunk in chunks) == chunks[-1].completion.text
        True
    """

    index: int
    text: str
    tokens: list[int]
    completion: Completion | None = None


class LLM:
    """A target and a drafter in this process. The text is that of plain decoding, whatever is drafted.

    Args:
        model: ``"smollm2"`` for the embedded model, a hub id, or a folder of a causal LM.
        drafter: A drafter's name such as ``"eagle3"``, which starts untrained (see :meth:`learn`) and drafts the 8,192
            lowest token ids. Or a checkpoint, as a folder or hub id, such as what ``llm.drafter.save_pretrained``
            wrote; a :class:`~aurora_rl.policies.Drafter`; or None for plain decoding.
        num_speculative_tokens: Number of tokens drafted per round, as a chain. What the request's own text says after
            the same words takes the place of less likely ones (``TreeShape.lookup``). So some are accepted before the
            drafter has learned anything.
        shape: Tree to draft instead of a chain; ``num_speculative_tokens`` is not used then. It needs a drafter.
        adaptive: Whether each round drafts what is fastest by measured acceptance and cost, up to that shape: the
            drafter's tree, lookup alone, or nothing. The text is the same. Making the LLM times rounds for it, which
            takes seconds on a CPU.
        dtype: "float32", "bfloat16", ... or a torch dtype; "auto" is bfloat16 where the device computes in it.
        device: Device of the target; "auto" is CUDA if there is one.
        num_slots: Requests decoded at the same time.
        max_length: Most tokens of prompt and completion; None takes the model's context, at most 2048.
        generation_config: "auto" applies the logits processors that the model's generation config asks for, such as
            ``repetition_penalty``, so that greedy text is that of ``generate``; "ignore" decodes raw logits.
        record: Whether completions carry their trajectory, which :meth:`learn` needs.
        seed: Seed of an untrained drafter's weights, of sampled drafts, and of the seeds that sampled requests without
            one draw. The same calls give the same texts, and copies of a prompt different ones.

    Attributes:
        drafter: The drafter that learns, in float32; a copy serves. None without one.
        tokenizer: The target's tokenizer.

    Raises:
        ModelError: The model cannot be loaded.
        UnsupportedModelError: The engine cannot serve the model exactly.
        CheckpointError: The drafter's checkpoint is broken, or made for another target.
        ValueError: An argument is of another kind, or out of range, or what the model's generation config asks for
            cannot be applied.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from aurora_rl.testing import tiny_folder
        >>> with TemporaryDirectory() as folder:
        ...     llm = LLM(tiny_folder(folder), drafter="eagle3", device="cpu")
        >>> chat = [{"role": "user", "content": "Write a haiku about rivers."}]
        >>> completions = llm.generate(["Once upon a time", chat], SamplingParams(max_tokens=8))
        >>> [len(completion.tokens) for completion in completions]
        [8, 8]
    """

    @torch.inference_mode(False)  # whatever the caller is in: what is made here may learn
    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        drafter: str | os.PathLike[str] | Drafter | None = None,
        num_speculative_tokens: int = 4,
        shape: TreeShape | None = None,
        adaptive: bool = False,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        num_slots: int = 4,
        max_length: int | None = None,
        generation_config: str = "auto",
        record: bool = False,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, str | os.PathLike):
            raise ValueError(f"model is a {_kind(model)}; give its name: 'smollm2', a folder or a hub id")
        if not isinstance(drafter, str | os.PathLike | Drafter | None):
            raise ValueError(
                f"drafter is a {_kind(drafter)}; give a name such as 'eagle3', a folder, a hub id, or a drafter made "
                "for this target"
            )
        if not isinstance(shape, TreeShape | None):
            raise ValueError(f"shape is {shape!r}; give a TreeShape, such as TreeShape(depth=4, width=2)")
        for name, value in (("adaptive", adaptive), ("record", record)):
            if not isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}; give True or False")
        if drafter is None and (shape is not None or adaptive):
            asked = f"shape is {shape}" if shape is not None else f"adaptive is {adaptive}"
            raise ValueError(
                f"{asked}, and there is no drafter to draft; name one, such as drafter='eagle3', or "
                "drafter='ngram', which looks up alone"
            )
        _check_integers(0, num_speculative_tokens=num_speculative_tokens, seed=seed)
        if seed >= 2**63:
            raise ValueError(f"seed is {seed}; give an integer with 0 <= seed < 2**63")
        _check_integers(1, num_slots=num_slots, **({} if max_length is None else {"max_length": max_length}))
        if generation_config not in ("auto", "ignore"):
            raise ValueError(f"generation_config is {generation_config!r}; give 'auto' or 'ignore'")
        device = usable_device(device)
        with naming_drafters(model):
            target, self.tokenizer = load_target(model, dtype=_dtype(dtype, device), device=device)
        self.drafter: Drafter | None = None
        self._optimizers: list[torch.optim.Optimizer] | None = None
        if drafter is not None:
            parts = TargetParts.of(target)
            self.drafter, self._head = _drafter(drafter, parts, seed), parts.head
            self.drafter.to(device)
        usual = shape is None
        if shape is None:
            looks_up = num_speculative_tokens > 0 and not isinstance(self.drafter, NgramDrafter | None)
            shape = TreeShape(num_speculative_tokens, lookup=USUAL_LOOKUP if looks_up else 0)
        if self.drafter is not None:
            _check_shape(self.drafter, shape, "num_speculative_tokens" if usual else "shape")
        if max_length is None:
            max_length = min(context_length(target.config.get_text_config()) or 2048, 2048)
        stop_tokens = stop_token_ids(target, self.tokenizer)
        self._waiting: deque[Request] = deque()
        self._ended: list[Completion] = []
        self._busy, self._next_id = False, 0
        self._seeds = random.Random(int(seed))  # for sampled requests without a seed; it takes no NumPy's
        self._decoder = SpeculativeDecoder(
            target,
            self.drafter,
            lambda: self._waiting.popleft() if self._waiting else None,
            shape=shape,
            max_length=max_length,
            num_slots=num_slots,
            seed=seed,
            stop_tokens=stop_tokens,
            decode=lambda tokens: detokenize(self.tokenizer, tokens),
            processors=generation_processors(target, stop_tokens) if generation_config == "auto" else None,
            on_completion=self._ended.append,
            record=record,
        )
        if adaptive:
            prompt = torch.arange(min(_TIMED[0], max_length // 2)) % self._decoder.engine.vocab_size
            timed = Request(0, prompt, SamplingParams(max_tokens=min(_TIMED[1], max_length - len(prompt))))
            try:
                self._decoder.adapt(timed)
            except DrafterError as fault:
                logger.warning("the shape of the trees stays, since the drafter failed: %s", fault)
        if self._decoder.policy is not None:
            self._decoder.policy.on_fault = lambda slot, fault: logger.warning(
                "a request goes on without the drafter: %s", fault
            )

    def generate(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Complete prompts.

        Args:
            prompts: One prompt or several, each a text to continue, token ids, or the messages of a chat.
            sampling_params: Parameters of all, or of each; None decodes greedily.

        Returns:
            A completion for each prompt, in their order. A prompt whose parameters have an ``n`` has as many, one after
            the other.

        Raises:
            ValueError: A prompt cannot be served, or there are neither one nor as many parameters as prompts; nothing
                was decoded.
            RuntimeError: A stream of this LLM is still open.
        """
        served = self._serve(self._requests(prompts, sampling_params))
        completions = {index: done for index, _, done in served if done is not None}
        return [completions[index] for index in sorted(completions)]

    def stream(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[Chunk]:
        """Complete prompts as :meth:`generate` does, and yield what each round added to a completion.

        Closing the iterator drops what is not complete.
        """
        requests = self._requests(prompts, sampling_params)
        texts = [Detokenizer(self.tokenizer, request.sampling_params.stop) for request in requests]
        return (
            Chunk(index, texts[index].feed(new) + ("" if done is None else texts[index].finish()), new, done)
            for index, new, done in self._serve(requests)
        )

    @torch.inference_mode(False)
    @torch.enable_grad()
    def learn(
        self,
        completions: Iterable[Completion],
        objectives: Sequence[Mapping[str, Any]] = ({"name": "imitation"},),
        *,
        batch_size: int = 4,
        replay: int = 4,
    ) -> float:
        """Train the drafter on completions, and serve its new weights from then on.

        Args:
            completions: Completions of an LLM with ``record=True``.
            objectives: What to learn, see :func:`~aurora_rl.objectives.make_objectives`.
            batch_size: Most completions of a gradient step.
            replay: Replayed batches for each new batch.

        Returns:
            The last step's loss.

        Raises:
            ValueError: There is no drafter, it cannot learn, nothing was recorded, an argument is out of range, or an
                objective does not fit.
        """
        if self.drafter is None or self._decoder.policy is None:
            raise ValueError("there is no drafter to train; name one, such as LLM(model, drafter='eagle3')")
        if any(weight.is_inference() for weight in self.drafter.parameters()):
            raise ValueError("the drafter was made under torch.inference_mode() and cannot learn; make it outside")
        _check_integers(1, batch_size=batch_size)
        _check_integers(0, replay=replay)
        done = list(completions) if isinstance(completions, Iterable) else [completions]
        if strangers := [each for each in done if not isinstance(each, Completion)]:
            raise ValueError(f"completions has a {_kind(strangers[0])}; give what llm.generate(...) returned")
        if not (stream := [each.trajectory for each in done if each.trajectory is not None]):
            raise ValueError("no completion has a trajectory to learn from; make the LLM with record=True")
        if all(len(each["sequence", "tokens"]) < 3 for each in stream):  # the first has no feature before it
            raise ValueError(
                "no completion is long enough to learn from: the third token of a text, prompt included, is the first "
                "that can be drafted; complete more tokens"
            )
        autocast = stream[0]["sequence", "features"].dtype == torch.bfloat16
        loss = SumLoss(make_objectives(objectives, self.drafter, self._head if autocast else self._head.float()))
        if self._optimizers is None:
            self._optimizers = drafter_optimizers(self.drafter)
        batch_size = min(batch_size, len(stream))
        for _, value, _ in train_on(
            stream, loss, self._optimizers, batch_size=batch_size, replay=replay, autocast=autocast
        ):
            last = value
        self._decoder.policy.install(self.drafter.published(), self._decoder.policy.version + 1)
        if self._decoder.controller is not None:
            self._decoder.controller.swapped()
        return last

    def _requests(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[Request]:
        """Encode and check all prompts, before any is served."""
        requests: list[Request] = []
        for index, (prompt, params) in enumerate(prompts_with_params(prompts, sampling_params)):
            try:
                tokens = encode_prompt(self.tokenizer, prompt)
                if params.max_tokens is None:
                    params = replace(params, max_tokens=max(self._decoder.engine.max_length - len(tokens), 1))
                for each in params.copies():
                    if each.temperature > 0 and each.seed is None:
                        each = replace(each, seed=self._seeds.getrandbits(63))
                    request = Request(self._next_id + len(requests), tokens, each)
                    self._decoder.env.check(request)
                    requests.append(request)
            except Exception as error:  # a template is a program of the model's, which may fail in any way
                reason = str(error).removeprefix(f"request {self._next_id + len(requests)}: ")
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                raise ValueError(f"prompt {index} cannot be served: {kind}{reason}") from error
        self._next_id += len(requests)
        return requests

    def _serve(self, requests: Sequence[Request]) -> Iterator[tuple[int, list[int], Completion | None]]:
        """Yield a request's place, the tokens that a round added, and its completion if it has ended."""
        if self._busy:
            raise RuntimeError(
                "a stream of this LLM is still open, or another thread is generating; read it to its end, or close() it"
            )
        self._busy = True
        try:
            self._waiting.extend(requests)
            place = {request.id: index for index, request in enumerate(requests)}
            for step in self._decoder.rounds():
                after = step["next"]
                ids, counts, rows = after["request"], after["observation", "num_new"], after["observation", "tokens"]
                columns = zip(ids.tolist(), counts.tolist(), rows.tolist(), strict=True)
                new = {id: row[:count] for id, count, row in columns if count}
                for done in self._ended:
                    text = detokenize(self.tokenizer, done.tokens.tolist(), done.request.sampling_params.stop)
                    yield place[done.request.id], new.pop(done.request.id, []), replace(done, text=text)
                self._ended.clear()
                yield from ((place[id], tokens, None) for id, tokens in new.items())
        finally:
            self._waiting.clear()
            self._ended.clear()
            self._busy = False


def _kind(value: object) -> str:
    return f"class, {value.__name__}" if isinstance(value, type) else type(value).__name__


def _check_shape(drafter: Drafter, shape: TreeShape, argument: str) -> None:
    """Raise ValueError if a drafter cannot draft trees of a shape, or no engine verifies them."""
    if shape.depth > drafter.max_depth:
        raise ValueError(
            f"{argument}: the trees are {shape.depth} deep, and this drafter drafts {drafter.max_depth} tokens at "
            "most; lower it to that"
        )
    if shape.max_nodes > Engine.max_nodes:
        raise ValueError(f"{argument}: trees have up to {shape.max_nodes} nodes, and at most {Engine.max_nodes} can be")
    if shape.depth and shape.mode not in drafter.draft_modes:
        raise ValueError(
            f"{argument}: {type(drafter).__name__} drafts in mode {' or '.join(drafter.draft_modes)}, "
            f"got {shape.mode!r}"
        )


def _check_integers(least: int, **values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ValueError(f"{name} must be an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _dtype(name: str | torch.dtype, device: str | torch.device) -> torch.dtype:
    if name == "auto":
        return default_dtype(device)
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {name!r}; give auto, float32, bfloat16, float16 or float64")
    return dtype


def _drafter(drafter: str | os.PathLike[str] | Drafter, parts: TargetParts, seed: int) -> Drafter:
    if isinstance(drafter, Drafter):
        if drafter.formats and drafter.trained_for not in (None, parts.fingerprint):
            raise ValueError(
                f"the drafter is trained for the target weights {drafter.trained_for}, these are {parts.fingerprint} "
                f"in {parts.embedding.dtype}; give the target that it is for, load it in the dtype that the "
                "drafter was started from (rounding to float16 makes other weights), or start a new one by its name. "
                "To serve it nevertheless, set its trained_for to None"
            )
        sizes = written(drafter).config if drafter.formats else {}
        for name in drafter.target_sizes:
            target = getattr(parts.config, name)
            if sizes.get(name, target) != target:
                raise ValueError(f"the drafter is for a target of {name}={sizes[name]}, and this one has {target}")
        return drafter.float()
    name = os.fspath(drafter)
    if isinstance(drafter, os.PathLike) or not names_drafter(name):
        return load_drafter(name, parts)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return start_untrained(get_drafter(name), parts)
