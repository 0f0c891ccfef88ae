"""Speculative decoding as a TorchRL environment: slots are the batch, a draft tree is the action."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Binary, Composite, Unbounded
from torchrl.envs import EnvBase
from transformers import LogitsProcessorList

from aurora_kernels.trees import accepted_path, valid_nodes
from aurora_rl.context import TrajectoryRecorder
from aurora_rl.envs.chunked_prefill import ChunkedPrefill
from aurora_rl.envs.engine import Engine
from aurora_rl.envs.processors import process
from aurora_rl.envs.request import Completion, Drafts, Request, TokenLogprobs, token_logprobs
from aurora_rl.envs.specs import specs
from aurora_rl.envs.verification.rules import get_rule
from aurora_rl.models.detokenizer import StopStrings
from aurora_rl.models.kv_cache import Packing
from aurora_rl.sampling_params import SamplingBatch
from aurora_rl.trajectories import DRAFT_MODES


@dataclass(slots=True)
class _Slot:
    """The request in a slot, what its logits pass through, and what is known of it so far."""

    request: Request
    processors: LogitsProcessorList | None = None
    stop_strings: StopStrings | None = None
    drafts: Drafts = field(default_factory=Drafts)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class SpecDecodeEnv(EnvBase):
    """Slots of an engine that decode speculatively.

    The action is a draft tree per slot. A step verifies it in one pass of the target, keeps the accepted path and adds
    the bonus token; an empty tree is plain decoding. The reward is the number of tokens delivered. A slot is done at a
    stop token or string (terminated) or at its token budget (truncated), and takes the next request at its reset. A
    slot without a request is idle: it delivers nothing and is done at every step, so that it asks again. So is a slot
    whose prompt is still being read, a chunk with each step while other slots decode.

    Args:
        engine: Engine of the target.
        requests: Called for the next request; None if there is none now.
        num_nodes: Most nodes ``N`` of a tree without its root.
        rule: Name of the verification rule, or its import path.
        draft_mode: How the trees are drawn, one of ``aurora_rl.trajectories.DRAFT_MODES``. Actions may say it as
            ("draft", "mode"); another mode is an error. If the rule needs the drafter's distribution, actions carry it
            as ("draft", "q").
        stop_tokens: Token ids that end a completion, unless its request says ``ignore_eos``.
        decode: Turns token ids into text, whole completions and their ends; needed only by requests with stop strings.
        processors: Returns the logits processors of transformers for a request, such as the result of
            :func:`aurora_rl.envs.generation_processors`; ValueError from it refuses the request. A processor must
            depend on ``input_ids`` and ``scores`` alone. None serves raw logits.
        on_completion: Called with each :class:`Completion` as it ends, after :attr:`on_tokens`.
        on_refused: Called with each request that cannot be served (see :meth:`check`) and the reason; the next request
            takes its place. None, the default, raises the reason as a ValueError.
        record: Whether completions carry their trajectory; an attribute too.

    Attributes:
        on_tokens: Called with each request that a round delivered tokens to, the tokens, and their log-probabilities
            if the request asked for them. None, the default, turns that off.
        recording_seconds: Wall time spent on trajectories so far.

    Raises:
        ValueError: The rule is not lossless for the draft mode, or trees have more nodes than the engine verifies.
            While serving: a request cannot be served (see :meth:`check`), an action was drawn in another mode, or it
            lacks the distribution that the rule needs.

    Example:
        >>> from aurora_rl.testing import tiny_target
        >>> from aurora_rl.envs import SamplingParams, TransformersEngine
        >>> engine = TransformersEngine(tiny_target(), num_slots=1, max_length=64, feature_layers=(0, 1))
        >>> queue = [Request(0, torch.tensor([3, 4, 5]), SamplingParams(max_tokens=8))]
        >>> env = SpecDecodeEnv(engine, lambda: queue.pop() if queue else None, num_nodes=3)
        >>> rollout = env.rollout(4)  # random trees: whatever is proposed, the text is the target's
        >>> rollout["next", "reward"].shape
        torch.Size([1, 4, 1])
    """

    def __init__(
        self,
        engine: Engine,
        requests: Callable[[], Request | None],
        *,
        num_nodes: int,
        rule: str = "sample_and_match",
        draft_mode: str = "topk",
        stop_tokens: tuple[int, ...] = (),
        decode: Callable[[list[int]], str] | None = None,
        processors: Callable[[Request], LogitsProcessorList] | None = None,
        on_completion: Callable[[Completion], None] | None = None,
        on_refused: Callable[[Request, str], None] | None = None,
        record: bool = True,
    ) -> None:
        store = engine.store
        device = store.tokens.device
        super().__init__(device=device, batch_size=[engine.num_slots])
        self.engine, self.num_nodes, self.rule, self.draft_mode = engine, num_nodes, get_rule(rule)(), draft_mode
        if draft_mode not in self.rule.draft_modes:
            raise ValueError(
                f"the rule {rule!r} would change the text of trees drawn by {draft_mode!r}; it needs "
                f"draft_mode {' or '.join(self.rule.draft_modes)}"
            )
        if num_nodes > engine.max_nodes:
            raise ValueError(
                f"num_nodes={num_nodes} is more than the {engine.max_nodes} nodes that the engine verifies"
            )
        self._requests, self._decode = requests, decode
        self.on_tokens: Callable[[Request, list[int], list[TokenLogprobs] | None], None] | None = None
        self.on_completion, self._on_refused = on_completion, on_refused
        self._stop_tokens = torch.tensor(stop_tokens, dtype=torch.int64, device=device)
        self._processors_for = processors
        self._active: dict[int, _Slot] = {}
        self._taken: deque[Request] = deque()  # checked, and waiting for a slot
        self._prefill = ChunkedPrefill(engine)
        self.recording_seconds = 0.0
        self.record, self._recorder = record, TrajectoryRecorder(store) if record else None
        self._set_sampling()
        self.observation_spec, self.action_spec = specs(engine, num_nodes, needs_q=self.rule.needs_q)
        flag = Binary(shape=(engine.num_slots, 1), dtype=torch.bool, device=device)
        self.reward_spec = Unbounded(shape=(engine.num_slots, 1), dtype=torch.float32, device=device)
        self.full_done_spec = Composite(
            done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=(engine.num_slots,), device=device
        )
        self._template = self.observation_spec.zero()

    def check(self, request: Request) -> None:
        """Raise ValueError, naming the value and the fix, where this environment cannot serve the request."""
        length, limit, vocab = len(request.prompt), self.engine.max_length, self.engine.vocab_size
        where = f"request {request.id}"
        if request.id < 0:
            raise ValueError(f"{where}: an id is not negative")
        if length < 1:
            raise ValueError(f"{where}: the prompt is empty; give at least one token")
        if not 0 <= int(request.prompt.min()) <= int(request.prompt.max()) < vocab:
            raise ValueError(
                f"{where}: the prompt's tokens must lie in 0..{vocab - 1} (the target's vocabulary), got "
                f"{int(request.prompt.min())}..{int(request.prompt.max())}; was it encoded by another tokenizer?"
            )
        if length + request.sampling_params.token_budget > limit:
            raise ValueError(
                f"{where}: a prompt of {length} tokens and {request.sampling_params.token_budget} new ones exceed the "
                f"context of {limit}; shorten the prompt, lower max_tokens or raise max_length"
            )
        if request.sampling_params.temperature > 0 and self.rule.name == "greedy":
            raise ValueError(
                f"{where}: temperature {request.sampling_params.temperature} needs the rule 'sample_and_match', not "
                "'greedy'"
            )
        if request.sampling_params.stop and self._decode is None:
            raise ValueError(f"{where}: stop strings need the environment's `decode`")
        if self._processors_for is not None:
            try:
                self._processors_for(request)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error

    def request_of(self, slot: int) -> Request:
        """Return the request in an occupied slot."""
        return self._active[slot].request

    @property
    def num_active(self) -> int:
        """Slots that hold a request, those whose prompts are being read included."""
        return len(self._active) + len(self._prefill)

    def cancel(self, request: int) -> bool:
        """Drop a request between two rounds; its slot is free for the next. Returns whether it was there."""
        for waiting in self._taken:
            if waiting.id == request:
                self._taken.remove(waiting)
                return True
        for slot, held in self._active.items():
            if held.request.id == request:
                self._release(slot)
                return True
        return self._prefill.drop(request)

    def _release(self, slot: int) -> None:
        del self._active[slot]
        if self._recorder:
            self._recorder.forget(slot)
        self.engine.release(slot)

    def _set_seed(self, seed: int | None) -> None:
        """Do nothing: requests carry their own seeds, and the environment draws nothing."""

    def _set_sampling(self) -> None:
        slots = range(self.engine.num_slots)
        params = [self._active[slot].request.sampling_params if slot in self._active else None for slot in slots]
        self._sampling = SamplingBatch.from_params(params, self.device)

    def _blank(self) -> TensorDict:
        """Return an observation of nothing; ``observation_spec.zero()`` costs a round several times as much."""
        out: Any = torch.zeros_like(self._template)
        out["speculate"].fill_(True)
        for key in ("request", ("verifier", "bonus_token")):
            out[key].fill_(-1)
        return out

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        flags = None if tensordict is None else tensordict.get("_reset", None)
        slots = list(range(self.engine.num_slots)) if flags is None else flags.flatten().nonzero().flatten().tolist()
        if flags is None:
            self._prefill.clear()
        # A bad request is refused here, before anything changes; good ones taken along with it wait for the next reset.
        free = [slot for slot in slots if slot not in self._prefill]
        while len(self._taken) < len(free) and (request := self._requests()) is not None:
            try:
                self.check(request)
            except ValueError as error:
                if self._on_refused is None:
                    raise
                self._on_refused(request, str(error))
            else:
                self._taken.append(request)
        for slot in slots:
            if slot in self._active:
                self._release(slot)
        for slot in free[: len(self._taken)]:
            self._prefill.add(slot, self._taken.popleft())
        loaded, out = self._prefill.take(slots, decoding=bool(self._active)), self._blank()
        for slot, request in loaded:
            stop = request.sampling_params.stop
            self._active[slot] = _Slot(
                request,
                self._processors_for and self._processors_for(request),
                StopStrings(self._decode, stop) if self._decode is not None and stop else None,
            )
            if self._recorder:
                self._recorder.start(slot)
            out["is_init"][slot], out["request"][slot] = True, request.id
        if loaded:
            self._set_sampling()
        for slot, held in self._active.items():
            out["speculate"][slot] = held.request.speculative
        out["observation", "position"].copy_(self._positions())
        for key in self.done_keys:
            out[key] = torch.zeros(*self.batch_size, 1, dtype=torch.bool, device=self.device)
        return out

    def _positions(self) -> Tensor:
        """Return the position of each slot's root; −1 of one that takes no part, its prompt complete or not."""
        positions = torch.full_like(self.engine.store.lengths, -1)
        active = sorted(self._active)
        positions[active] = self.engine.store.lengths[active] - 1
        return positions

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        # A slot whose prompt a round completes takes part from the next reset on.
        slots, out = torch.tensor(sorted(self._active), dtype=torch.int64), self._blank()
        out["reward"] = torch.zeros(*self.batch_size, 1, dtype=torch.float32, device=self.device)
        out["terminated"] = torch.zeros(*self.batch_size, 1, dtype=torch.bool, device=self.device)
        out["truncated"] = torch.ones_like(out["terminated"])  # idle slots report this
        if len(slots):
            self._round(tensordict, slots, out)
            self._prefill.end_round()
        out["observation", "position"].copy_(self._positions())
        out["done"] = out["terminated"] | out["truncated"]
        return out

    def _round(self, tensordict: TensorDictBase, slots: Tensor, out: TensorDictBase) -> None:
        """Verify, judge, commit and deliver one round of the occupied slots, written into the step's result."""
        engine, store, draft = self.engine, self.engine.store, tensordict["draft"]
        rows = slots.to(self.device)
        tokens, parents = draft["tokens"][rows], draft["parents"][rows]
        repeats = self.draft_mode == "sampled"
        valid = valid_nodes(tokens, parents, draft["mask"][rows], engine.vocab_size, repeats=repeats)
        # Columns that are padding in every slot are not computed.
        width = int(valid.any(0).nonzero().max()) + 1 if bool(valid.any()) else 0
        tokens, parents, valid = tokens[:, :width], parents[:, :width], valid[:, :width]
        if width:
            self._check_draft(draft, rows[valid.any(1)])

        hidden = self._prefill.verify(slots, tokens, parents, valid)
        roots = store.lengths[slots] - 1
        sampling = self._sampling[rows]
        q = None
        if self.rule.needs_q:  # rounds that are decoded plainly may come without
            q = draft["q"][rows, :width] if width else hidden.new_zeros(len(slots), 0, engine.vocab_size)
        packing = Packing(F.pad(valid, (1, 0), value=True))  # padding is not multiplied with the head
        logits = packing.unpack(engine.logits(packing.pack(hidden)))
        occupied = slots.tolist()
        raw, held = logits, [self._active[slot] for slot in occupied]
        if any(each.processors for each in held):
            texts = [store.tokens[slot, : int(store.lengths[slot])] for slot in occupied]
            logits = process(
                logits, texts, tokens, parents, valid, [each.processors or LogitsProcessorList() for each in held]
            )
        verdict = self.rule.verify(logits, tokens, parents, valid, roots.to(self.device), sampling, q)
        path, length = accepted_path(verdict.accepted)
        sequence = torch.cat([tokens.gather(1, path.clamp(min=0)), verdict.bonus_token[:, None]], dim=1)
        sequence.scatter_(1, length[:, None], verdict.bonus_token[:, None])
        num_new, ended, spent = self._deliver(slots, sequence, length)

        place = torch.arange(width, device=self.device)
        kept = path.masked_fill(place >= num_new.to(self.device)[:, None], -1)
        accepted = torch.zeros_like(verdict.accepted)
        row, column = (kept >= 0).nonzero(as_tuple=True)
        accepted[row, kept[row, column]] = True
        bonus = torch.where(num_new.to(self.device) > length, verdict.bonus_token, -1)

        verifier, observation = out["verifier"], out["observation"]
        verifier["accepted"][rows, :width] = accepted
        verifier["hidden"][rows, : width + 1] = hidden
        verifier["bonus_token"][rows] = bonus
        if self._recorder:
            self._record(tensordict, rows, roots, tokens, parents, valid, accepted, hidden)
        features = engine.commit(slots, kept, sequence, num_new)
        observation["tokens"][rows, : width + 1] = sequence
        observation["features"][rows, : width + 1] = features
        observation["num_new"][rows] = num_new.to(self.device)
        out["reward"][rows, 0] = num_new.to(self.device, torch.float32)
        out["terminated"][rows, 0] = ended.to(self.device)
        out["truncated"][rows, 0] = (spent & ~ended).to(self.device)
        out["request"][rows] = torch.tensor([each.request.id for each in held], device=self.device)
        out["speculate"][rows, 0] = torch.tensor([each.request.speculative for each in held], device=self.device)
        counts = zip(valid.sum(1).tolist(), accepted.sum(1).tolist(), num_new.tolist(), strict=True)
        for index, (slot, each, (nodes, taken, delivered)) in enumerate(zip(occupied, held, counts, strict=True)):
            if nodes:
                each.drafts.add(taken, nodes, delivered)
            new, logprobs = sequence[index, :delivered].tolist(), None
            if (top := each.request.sampling_params.logprobs) is not None:
                judged = [0, *(node + 1 for node in path[index, : delivered - 1].tolist())]
                logprobs = token_logprobs(raw[index, judged], new, top)
                each.logprobs += logprobs
            if self.on_tokens:
                self.on_tokens(each.request, new, logprobs)
            if bool(ended[index] | spent[index]):
                self._finish(slot, bool(ended[index]))

    def _check_draft(self, draft: TensorDictBase, drafted: Tensor) -> None:
        """Raise ValueError where the trees of these rows are not what the rule and the record take them for."""
        mode = draft.get("mode", None)
        for code in [] if mode is None else mode[drafted].unique().tolist():
            if DRAFT_MODES[code] != self.draft_mode:
                raise ValueError(
                    f"the policy's trees are drawn by {DRAFT_MODES[code]!r}, and the environment was made with "
                    f"draft_mode={self.draft_mode!r}; give both the same: "
                    "SpecDecodeEnv(..., draft_mode=policy.shape.mode)"
                )
        if self.rule.needs_q and "q" not in draft.keys():
            raise ValueError(
                f"the rule {self.rule.name!r} compares with the drafter's distribution, and the action has no "
                "('draft', 'q'); make the policy with it: DrafterPolicy(..., vocab_size=engine.vocab_size)"
            )

    def _deliver(self, slots: Tensor, sequence: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return how many tokens of path and bonus each slot delivers, whether it ended, and whether its budget did."""
        store = self.engine.store
        generated = store.lengths[slots] - store.prompt_lengths[slots]
        stops = torch.isin(sequence, self._stop_tokens).tolist()
        counts, ended, spent = [], [], []
        columns = zip(slots.tolist(), length.tolist(), generated.tolist(), strict=True)
        for i, (slot, drafted, done) in enumerate(columns):
            held = self._active[slot]
            sampling = held.request.sampling_params
            budget = sampling.token_budget
            count = min(drafted + 1, budget - done)
            stop = None if sampling.ignore_eos else next((j + 1 for j in range(count) if stops[i][j]), None)
            if held.stop_strings is not None:
                tokens = sequence[i, : stop or count].tolist()
                stop = next((j for j, token in enumerate(tokens, 1) if held.stop_strings.feed(token)), stop)
            counts.append(stop or count)
            ended.append(stop is not None)
            spent.append(done + counts[-1] >= budget)
        return torch.tensor(counts), torch.tensor(ended), torch.tensor(spent)

    def _record(
        self,
        tensordict: TensorDictBase,
        rows: Tensor,
        roots: Tensor,
        tokens: Tensor,
        parents: Tensor,
        valid: Tensor,
        accepted: Tensor,
        hidden: Tensor,
    ) -> None:
        assert self._recorder is not None
        began = time.perf_counter()
        log_probs = tensordict.get(("draft", "log_probs"), None)
        if log_probs is None:  # a policy that keeps no probabilities, such as a random one
            shape = tensordict["draft", "tokens"].shape
            log_probs = torch.full(shape, torch.nan, dtype=torch.float32, device=self.device)
        zero = torch.zeros(self.batch_size, dtype=torch.int64)
        self._recorder.round(
            rows.tolist(),
            roots.tolist(),
            tokens,
            parents,
            log_probs[rows, : tokens.shape[1]],
            valid,
            accepted,
            hidden,
            tensordict.get("policy_version", zero)[rows.cpu()].tolist(),
            tensordict.get("cache_version", zero)[rows.cpu()].tolist(),
        )
        self.recording_seconds += time.perf_counter() - began

    def trajectory_from(self, slot: int, first: int) -> TensorDict:
        """Return the trajectory of an occupied slot so far, as that of a request whose completion begins at ``first``.

        ``first`` is the length of the prompt, or of the text after an earlier round. Layout and dtypes are those of
        :func:`~aurora_rl.trajectories.make_trajectory`.
        """
        assert self._recorder is not None, "an environment with record=False has no trajectories"
        began, request = time.perf_counter(), self._active[slot].request
        trajectory = self._recorder.trajectory_from(
            slot, first, request.id, request.sampling_params, self.rule.name, self.draft_mode
        )
        self.recording_seconds += time.perf_counter() - began
        return trajectory

    def _finish(self, slot: int, ended: bool) -> None:
        held, store = self._active[slot], self.engine.store
        request, trajectory = held.request, None
        if self._recorder:
            trajectory = self.trajectory_from(slot, int(store.prompt_lengths[slot]))
        tokens = store.tokens[slot, int(store.prompt_lengths[slot]) : int(store.lengths[slot])].cpu().clone()
        cached = int(store.cached_lengths[slot])
        self._release(slot)
        if self.on_completion:
            logprobs = None if request.sampling_params.logprobs is None else held.logprobs
            self.on_completion(
                Completion(request, tokens, ended, trajectory, held.drafts, logprobs, cached_tokens=cached)
            )
