"""The plugin in SGLang's scheduler process: hooks that watch drafting and verification, and swaps between batches.

At the address in the environment variable AURORA_RL_SGLANG the plugin answers requests of
:mod:`aurora_rl.envs.remote.plugin_server`; from ``attach`` to ``detach`` it records and swaps.

A hook calls the engine's own function with the same arguments and returns its result. A fault of ours switches
recording off and never reaches the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from aurora_rl.collectors.handshake import Handshake
from aurora_rl.envs.remote.assembler import EngineRound, TargetRows
from aurora_rl.envs.remote.checks import check_target
from aurora_rl.envs.remote.copies import copies_done, to_host
from aurora_rl.envs.remote.plugin import RecorderPlugin
from aurora_rl.envs.remote.plugin_server import PluginError, replica_address
from aurora_rl.envs.remote.session import Session
from aurora_rl.envs.sglang import ENGINE, LEARNED
from aurora_rl.envs.sglang.ranks import EngineRanks, Order
from aurora_rl.envs.sglang.refusals import drafter_fault, layout_fault, target_fault
from aurora_rl.envs.sglang.requests import sampling_of, unwanted
from aurora_rl.envs.sglang.swaps import Swaps
from aurora_rl.envs.sglang.weights import draft_vocab
from aurora_rl.tenants import tenant_of_salt

logger = logging.getLogger(__name__)

SUPPORTED = ("0.5.21",)
"""Versions of SGLang whose functions the hooks were written for; the first with weight sessions for the drafter."""

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_RECEIVER = "sglang.srt.managers.scheduler_components.request_receiver.SchedulerRequestReceiver"
_DRAFTER = "sglang.srt.speculative.eagle_worker_v2.EagleDraftWorker"
_LEFT_OUT = "_aurora_rl_left_out"  # attribute of SGLang's request objects


class Plugin(RecorderPlugin):
    """State of one scheduler process, which answers requests at ``address``, with the keys in a folder if there are."""

    engine = ENGINE

    def __init__(self, address: str, keys: str | None = None) -> None:
        super().__init__(address, keys)
        self._scheduler: Any = None
        self._swaps: Swaps | None = None
        self._missing: list[str] = []
        # The forward pass that runs now: what the target's head read and gave, what the drafter's logits were.
        self._head: tuple[Tensor, Tensor] | None = None
        self._draft_logits: list[Tensor] = []
        self._path_scores: Tensor | None = None
        self._joint_log_probs: Tensor | None = None
        # The round that is verified now: requests to record, by their row, and the target's distributions.
        self._wanted: list[tuple[int, str]] = []
        self._rows: TargetRows | None = None

    def hooks(self) -> dict[str, Callable[..., Any]]:
        """Return the hooks by the functions that they wrap."""
        return {
            f"{_RECEIVER}._broadcast_reqs_across_ranks": self._send_orders,
            f"{_SCHEDULER}.process_input_requests": self._between_batches,
            f"{_SCHEDULER}.process_batch_result": self._after(self._finish_requests),
            f"{_DRAFTER}.draft": self._draft,
            f"{_DRAFTER}._draft_extend_for_prefill": self._prefill,
            f"{_DRAFTER}._draft_extend_for_decode": self._extend,
            "sglang.srt.speculative.eagle_utils.organize_draft_results": self._after(self._keep_path_scores),
            "sglang.srt.speculative.eagle_utils.eagle_sample": self._verify,
            "sglang.srt.layers.logits_processor.LogitsProcessor._get_logits": self._after(self._keep_logits),
        }

    # ---- requests and replies ---------------------------------------------------------------------------------------

    def _send_orders(self, original: Callable, receiver: Any, requests: Any, *args: Any, **kwargs: Any) -> Any:
        """Let the first rank's orders travel to all ranks with the requests that came."""
        orders: list[Order] = []
        if (swaps := self._swaps) is not None and swaps.ranks.rank == 0:
            self._guarded(lambda: orders.extend(swaps.due(self._session, self._seen["verify"])))
        return original(receiver, [*requests, *orders] if orders else requests, *args, **kwargs)

    def _between_batches(self, original: Callable, scheduler: Any, requests: Any, *args: Any, **kwargs: Any) -> Any:
        if self._scheduler is None:
            self._guarded(self._bind, scheduler)
        if (swaps := self._swaps) is not None:
            # Before new requests are let in: a cache can be emptied only between all of them.
            for order in [each for each in requests if isinstance(each, Order)]:
                self._guarded(swaps.obey, order, self._draft_logits)
            requests = [each for each in requests if not isinstance(each, Order)]
            swaps.forget()
        return original(scheduler, requests, *args, **kwargs)

    def _bind(self, scheduler: Any) -> None:
        from sglang.srt.plugins.hook_registry import HookRegistry
        from sglang.srt.runtime_context import get_parallel

        self._scheduler = scheduler
        self._missing = sorted(set(self.hooks()) - HookRegistry._patched)  # SGLang itself only logs what failed
        ranks = EngineRanks(scheduler.tp_cpu_group if scheduler.server_args.tp_size > 1 else None)
        ranks.register(self._missing)
        self._swaps = Swaps(scheduler, ranks)
        if not ranks.rank:  # the first one answers for all
            self._address = replica_address(self._address, get_parallel().dp_rank or 0)
            self._listen()

    @override
    def _status(self) -> dict[str, Any]:
        args, model, session = self._scheduler.server_args, self._scheduler.model_config, self._session
        return {
            "sglang": version("sglang"),
            "torch": torch.__version__,
            "missing": self._missing,
            "seen": dict(self._seen),
            "device": self._device,
            "model": str(args.model_path),
            "dtype": str(model.dtype).removeprefix("torch."),
            "context": model.context_len,
            "depth": args.speculative_num_steps,
            "width": args.speculative_eagle_topk,
            "num_nodes": args.speculative_num_draft_tokens - 1,
            "slots": self._scheduler.max_running_requests,
            "tp_size": args.tp_size,
            "dp_size": args.dp_size,
            "ranks": [] if self._swaps is None else self._swaps.reports,
            "attached": session is not None,
            "session": self._last_session,
            **({} if session is None else session.status()),
        }

    @property
    @override
    def _exact(self) -> bool:
        return self._device == "cpu" or bool(self._scheduler.server_args.disable_cuda_graph)

    @override
    def _check_engine(self, handshake: Handshake) -> None:
        args, worker = self._scheduler.server_args, self._scheduler.draft_worker
        assert self._swaps is not None
        if version("sglang") not in SUPPORTED:
            raise PluginError(f"SGLang {version('sglang')} is not supported; install sglang=={SUPPORTED[-1]}")
        if self._missing:
            raise PluginError(
                f"hooks are not in force in SGLang {version('sglang')}: {', '.join(self._missing)}; its log says why "
                f"(supported: {', '.join(SUPPORTED)})"
            )
        if reason := layout_fault(args.resolved_dict()) or self._swaps.ranks.unfit():
            raise PluginError(reason)
        algorithm = str(args.speculative_algorithm).upper()
        if algorithm not in LEARNED or type(worker).__name__ != "EAGLEWorkerV2":
            raise PluginError(
                f"speculative_algorithm is {args.speculative_algorithm!r} (worker {type(worker).__name__}); "
                f"start the server with --speculative-algorithm {' or '.join(LEARNED)}"
            )
        if reason := drafter_fault(self._draft_worker.draft_runner.model):
            raise PluginError(reason)
        if args.speculative_use_rejection_sampling:
            raise PluginError("rejection sampling is not recorded; start without --speculative-use-rejection-sampling")
        for name in ("speculative_accept_threshold_single", "speculative_accept_threshold_acc"):
            if getattr(args, name) < 1:
                raise PluginError(f"{name}={getattr(args, name)} changes the text (it is lossy); leave it at 1.0")
        target = self._target
        if reason := target_fault(target, algorithm, hybrid=bool(self._scheduler.is_hybrid_ssm)):
            raise PluginError(reason)
        # EAGLE reads what the target's head reads, which is no layer that SGLang reads.
        layers = tuple(target.model.layers_to_capture) if algorithm == "EAGLE3" else (target.config.num_hidden_layers,)
        if layers != handshake.feature_layers:
            learner = handshake.feature_layers
            raise PluginError(f"feature_layers is {learner} at the learner and {layers} at the engine")
        check_target(
            handshake,
            head=self._swaps.head(),
            bias=getattr(target.lm_head, "bias", None),
            config=target.config,
            vocab=draft_vocab(self._draft_worker),
            folder="one folder, EAGLE also with its --speculative-token-map",
        )

    @property
    def _device(self) -> str:
        return str(self._draft_worker.draft_runner.device)

    @property
    def _target(self) -> Any:
        return self._scheduler.tp_worker.model_runner.model

    @property
    def _draft_worker(self) -> Any:
        if (worker := getattr(self._scheduler.draft_worker, "draft_worker", None)) is None:
            algorithm = self._scheduler.server_args.speculative_algorithm
            raise PluginError(
                f"this server has no drafter (speculative_algorithm is {algorithm!r}); start it with "
                f"--speculative-algorithm {' or '.join(LEARNED)}"
            )
        return worker

    # ---- drafting -------------------------------------------------------------------------------------------------

    def _keep_logits(
        self, _: Session, logits: Tensor, processor: Any, hidden: Tensor, *args: Any, **kwargs: Any
    ) -> None:
        if processor is self._target.logits_processor:
            self._head = hidden, logits
        elif processor is self._draft_worker.draft_runner.model.logits_processor:
            self._draft_logits.append(logits)

    def _extend(self, original: Callable, worker: Any, batch: Any, result: Any) -> Any:
        self._draft_logits.clear()
        out = original(worker, batch, result)
        if self._session is not None:
            self._guarded(self._keep_first_score, worker, result)
        return out

    def _keep_first_score(self, worker: Any, result: Any) -> None:
        """Put the probabilities of a chain in the place of SGLang's ones, which only this recorder reads."""
        drafted = result.next_draft_input
        if worker.topk != 1 or len(self._draft_logits) != 1 or drafted.topk_index is None:
            return
        width = worker.speculative_num_draft_tokens
        rows = torch.arange(len(result.accept_lens), device=result.accept_lens.device) * width + result.accept_lens - 1
        logits = self._draft_logits[0]
        if len(logits) == len(rows) * width:
            drafted.topk_p = logits[rows].softmax(-1, dtype=torch.float32).gather(-1, drafted.topk_index.long())

    def _keep_path_scores(self, _: Session, out: Any, scores: list[Tensor], *args: Any, **kwargs: Any) -> None:
        self._path_scores = torch.cat(scores, dim=1).flatten(1).gather(1, out[1])

    def _draft(self, original: Callable, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        self._draft_logits.clear()
        self._path_scores = self._joint_log_probs = self._head = None
        first = getattr(getattr(batch, "spec_info", None), "topk_p", None)  # replaced by what follows
        out = original(worker, batch, *args, **kwargs)
        if self._session is not None:
            self._guarded(self._keep_scores, worker, first)
        return out

    def _keep_scores(self, worker: Any, first: Tensor | None) -> None:
        if self._path_scores is not None:
            self._joint_log_probs = self._path_scores.log()
        elif worker.topk == 1 and first is not None and len(self._draft_logits) == worker.speculative_num_steps - 1:
            later = [logits.log_softmax(-1, dtype=torch.float32).amax(-1) for logits in self._draft_logits]
            self._joint_log_probs = torch.stack([first[:, 0].log(), *later], dim=1).cumsum(1)

    # ---- recording ------------------------------------------------------------------------------------------------

    def _prefill(self, original: Callable, worker: Any, batch: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._seen["prefill"] += 1
        session = self._session
        if session is not None and session.recording:
            self._guarded(self._record_prompts, session, batch, hidden)
        self._head = None
        self._draft_logits.clear()
        return original(worker, batch, hidden, *args, **kwargs)

    def _record_prompts(self, session: Session, batch: Any, hidden: Tensor) -> None:
        if batch.forward_mode.is_idle():
            return
        assembler, start = session.assembler, 0
        # One row a request where no request wants log-probabilities of its prompt.
        head = self._head if self._head is not None and len(self._head[0]) == len(batch.reqs) else None
        for i, (req, count, cached) in enumerate(zip(batch.reqs, batch.extend_lens, batch.prefix_lens, strict=True)):
            part, start = slice(start, start + count), start + count
            if getattr(req, _LEFT_OUT, False):  # decided at the first part of its prompt
                continue
            if req.rid not in assembler:
                reason = unwanted(req, capture_rate=session.capture_rate, greedy_only=self._device == "cpu")
                if reason is not None:
                    assembler.counts[reason] += 1
                begun = req.origin_input_ids, cached, session.version
                if reason is not None or not assembler.begin(
                    req.rid, *begun, sampling_of(req), tenant_of_salt(req.cache_salt)
                ):
                    setattr(req, _LEFT_OUT, True)
                    continue
            if assembler.prefilled(req.rid) != cached:  # run a second time, after the engine had to put it back
                assembler.drop(req.rid, "retracted")
                setattr(req, _LEFT_OUT, True)
                continue
            rows = None
            if head is not None and cached + count == len(req.origin_input_ids):
                rows = session.target_rows(head[0][i : i + 1], head[1][i : i + 1])
            assembler.prompt(req.rid, to_host(hidden[part]), rows)

    def _verify(self, original: Callable, tree: Any, batch: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        self._seen["verify"] += 1
        session, self._rows, self._wanted = self._session, None, []
        if session is not None and session.recording:
            # Before the engine's own function, which applies penalties to the logits in place.
            self._guarded(self._keep_target, session, batch, output)
        result = original(tree, batch, output, *args, **kwargs)
        if session is not None and self._rows is not None:
            self._guarded(self._record_round, session, tree, batch, output.hidden_states, result)
        return result

    def _keep_target(self, session: Session, batch: Any, output: Any) -> None:
        if batch.forward_mode.is_idle():
            return
        self._wanted = [(i, req.rid) for i, req in enumerate(batch.reqs) if req.rid in session.assembler]
        if self._wanted:
            logits = output.next_token_logits
            hidden = self._head[0] if self._head is not None and len(self._head[0]) == len(logits) else None
            self._rows = session.target_rows(hidden, logits)

    def _record_round(
        self, session: Session, tree: Any, batch: Any, features: Tensor, result: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        assert self._rows is not None
        target, (_, path_lengths, paths) = self._rows, result
        n, width = len(batch.seq_lens), tree.draft_token_num
        joint = self._joint_log_probs
        if joint is not None and joint.shape != (n, width - 1):
            joint = None
        self._seen["log_probs"] += joint is not None
        self._seen["hidden"] += "hidden" in target
        parts = {
            "anchor": batch.seq_lens,
            "tokens": tree.draft_token.view(n, width),
            "first_child": tree.retrieve_next_token.view(n, width),
            "next_sibling": tree.retrieve_next_sibling.view(n, width),
            "path": paths.view(n, -1) - width * torch.arange(n, device=paths.device)[:, None],
            "path_length": path_lengths,
            "features": features.view(n, width, -1),
        }
        copies = {name: to_host(part) for name, part in parts.items()}
        scores = None if joint is None else to_host(joint)
        trees = {key: value.view(n, width, *value.shape[1:]) for key, value in target.items()}
        ready = copies_done(features.device)
        for i, rid in self._wanted:
            drafted = EngineRound(
                **{name: copy[i] for name, copy in copies.items()},
                joint_log_probs=None if scores is None else scores[i],
                target={key: value[i] for key, value in trees.items()},
                policy_version=session.version,
                ready=ready,
            )
            session.assembler.round(rid, drafted)

    def _finish_requests(self, session: Session, out: Any, scheduler: Any, batch: Any, result: Any) -> None:
        for req in batch.reqs:
            if req.rid in session.assembler and req.finished():
                reason = type(req.finished_reason).__name__
                if reason == "FINISH_ABORT":
                    session.assembler.drop(req.rid, "aborted")
                    continue
                ended, terminated = req.output_ids_through_stop, reason != "FINISH_LENGTH"
                session.assembler.finish(req.rid, ended, terminated=terminated)
