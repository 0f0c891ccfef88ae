"""Check that the drafter in SGLang's scheduler is still what was loaded: its tensors, its inputs and its cache.

SGLang's drafter cannot be asked on the side, as that of :mod:`aurora_rl.serving.watchdog` is. So each check
compares what must not change with what it was. No learner is needed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aurora_rl.envs.remote.session import Follower, Session
from aurora_rl.policies.faults import EVERY, PORTIONS, Fault, TensorSample, difference, same, sample, unchanged

logger = logging.getLogger(__name__)

_ROWS, _REQUESTS = 32, 8  # positions of a prompt whose rows are compared, and requests at a time


class _Rows(NamedTuple):
    """Where a running request's first rows are in the drafter's cache, and what they are."""

    req: Any  # ids of requests may come again
    places: Tensor
    held: Tensor


class DrafterWatchdog:
    """Checks the drafter of one scheduler between batches, and mends what copies of its tensors can mend.

    It keeps copies of the version that is served and of the one before it, on the drafter's device. The tensors that
    the drafter shares with the target are compared by a sample, as are its buffers, such as rotary tables.

    Args:
        scheduler: SGLang's scheduler.
        session: Session that gets the faults.
        agree: Takes the fault that a check found here, None if it found none, and returns the one to mend. With several
            ranks it is that of the first that found one, so that all mend the same.
    """

    def __init__(
        self,
        scheduler: Any,
        session: Session | Follower,
        agree: Callable[[Fault | None], Fault | None] = lambda fault: fault,
    ) -> None:
        self.session, self._scheduler, self._agree = session, scheduler, agree
        self._copies: dict[int, dict[str, Tensor]] = {}
        self._rows: dict[tuple[str, int], _Rows] = {}
        self._found: Counter[tuple[int, str]] = Counter()  # faults by version and cause
        self._checked = self._turn = 0
        self._logits: Sequence[Tensor] = ()
        self._checks = [self._tensor_fault, self._constant_fault, self._cache_fault, self._dead_fault]
        try:
            self._worker, self._target = scheduler.draft_worker.draft_worker, scheduler.tp_worker.model_runner.model
            self._constants = self._sampled()
        except Exception:
            self.give_up()
        self.loaded()

    def loaded(self) -> None:
        """Copy what the drafter holds, as the version that the session serves now."""
        if not self._checks:
            return
        try:
            older = {number: copy for number, copy in self._copies.items() if number < self.session.version}
            self._copies = dict(sorted(older.items())[-1:])  # before there is another: memory is of two
            self._copies[self.session.version] = {name: tensor.clone() for name, tensor in self._tensors()[0].items()}
            self._rows.clear()
        except Exception:
            self.give_up()

    def give_up(self) -> None:
        """Watch nothing, as where there is no memory for copies: recording and swaps go on."""
        logger.warning("the drafter is not watched", exc_info=True)
        self._copies, self._checks = {}, []

    @property
    def watches(self) -> bool:
        """Whether there is something to compare with."""
        return bool(self._copies)

    def forget(self) -> None:
        """Drop the rows of requests, which were made of users' texts, once none runs."""
        if not self._scheduler.running_batch.reqs:
            self._rows.clear()

    def due(self, rounds: int) -> bool:
        """Return whether to check now, after so many rounds that SGLang has verified."""
        return rounds - self._checked >= EVERY

    def check(self, rounds: int, logits: Sequence[Tensor]) -> None:
        """Check, after so many rounds that SGLang has verified, and mend what is wrong.

        ``logits`` are the drafter's of the last round, ``[n, Vd]`` each; empty if CUDA graphs hide them.
        """
        self._checked, self._turn = rounds, self._turn + 1
        self._logits, found = logits, None
        for find in list(self._checks):
            try:
                if (found := find()) is not None:
                    break
            except Exception:  # a fault of ours must cost neither recording nor swaps
                logger.exception("a check of the drafter failed and is left out from now on")
                self._checks.remove(find)
        if (fault := self._agree(found)) is not None:
            try:
                self._mend(fault)
            except Exception:
                logger.exception("what is wrong with the drafter could not be mended")

    # ---- what is compared -------------------------------------------------------------------------------------------

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the drafter's own parameters, and its other tensors: buffers, and what it shares with the target."""
        targets = {parameter.data_ptr() for parameter in self._target.parameters()}
        model: nn.Module = self._worker.draft_runner.model
        parameters = {name: parameter.data for name, parameter in model.named_parameters()}
        own = {name: tensor for name, tensor in parameters.items() if tensor.data_ptr() not in targets}
        return own, {name: tensor for name, tensor in parameters.items() if name not in own} | dict(
            model.named_buffers()
        )

    def _fixed(self) -> dict[str, Tensor]:
        """Return what no weights change: tensors, the draft vocabulary, and the layers that it reads."""
        found = {f"tensor {name!r}": tensor for name, tensor in self._tensors()[1].items()}
        if (rows := self._worker.hot_token_id) is not None:
            found["the draft vocabulary"] = rows
        layers = getattr(self._target.model, "layers_to_capture", [])
        return {**found, "the list of layers whose states it reads": torch.tensor(list(layers))}

    def _sampled(self) -> dict[str, TensorSample]:
        """Return samples of what no weights change, and the whole of the draft vocabulary."""
        return {
            name: sample(tensor, tensor.numel()) if name == "the draft vocabulary" else sample(tensor)
            for name, tensor in self._fixed().items()
        }

    def _tensor_fault(self) -> Fault | None:
        """Compare a third of the tensors with those that were loaded; all of them if one differs."""
        held, loaded = self._tensors()[0], self._copies[self.session.version]
        if all(same(held[name], loaded[name]) for name in list(loaded)[self._turn % PORTIONS :: PORTIONS]):
            return None
        for version, old in self._copies.items():
            if version != self.session.version and all(same(held[name], old[name]) for name in old):
                return Fault("stale", f"all tensors are those of version {version}, not {self.session.version}")
        different = [name for name in loaded if not same(held[name], loaded[name])]
        more = f", and {len(different) - 1} other tensors differ" if len(different) > 1 else ""
        name = different[0]
        return Fault("corrupted", f"tensor {name!r} {difference(held[name], loaded[name])}{more}")

    def _constant_fault(self) -> Fault | None:
        """Compare what no weights change with what it was when the session began."""
        now = self._fixed()
        for name, before in self._constants.items():
            if name not in now or not unchanged(now[name], before):
                self._constants = self._sampled()  # it is told once
                return Fault("mismatched", f"{name} changed while it served")
            if now[name].shape != before.shape:  # rows that were appended are to stay what they are, too
                self._constants[name] = sample(now[name])
        return None

    def _cache_fault(self) -> Fault | None:
        """Compare the first rows of running requests with what they were at the check before."""
        before, self._rows = self._rows, {}
        pool, table = self._worker.draft_runner.token_to_kv_pool, self._scheduler.req_to_token_pool.req_to_token
        layers = range(pool.start_layer, pool.start_layer + pool.layer_num)
        for req in self._scheduler.running_batch.reqs[:_REQUESTS]:
            count = min(len(req.origin_input_ids) - 1, _ROWS)
            if count < 1 or not req.output_ids or req.finished():  # its rows may be another's
                continue
            places = table[req.kv.req_pool_idx, :count].clone()
            rows = torch.cat([part[places].flatten(1) for layer in layers for part in pool.get_kv_buffer(layer)], 1)
            key = req.rid, req.retraction_count
            self._rows[key] = _Rows(req, places, rows.contiguous().view(torch.uint8))  # equal bits, infinite ones too
            if (old := before.get(key)) is not None and old.req is req and torch.equal(old.places, places):
                changed = (old.held != self._rows[key].held).any(1)
                if bool(changed.any()):
                    first = int(changed.int().argmax())
                    return Fault("cache", f"its rows of a prompt changed while it is decoded, from position {first} on")
        return None

    def _dead_fault(self) -> Fault | None:
        """Look for rows of logits without a finite number."""
        if all(bool(each.isfinite().any(-1).all()) for each in self._logits):
            return None
        return Fault("dead", "in a row of its logits no number is finite")

    # ---- what is done -----------------------------------------------------------------------------------------------

    def _mend(self, fault: Fault) -> None:
        """Do what copies of the tensors allow, and say so."""
        session, version = self.session, self.session.version
        found = self._found[version, fault.cause]
        self._found[version, fault.cause] += 1
        before = min(self._copies)
        if fault.cause in ("corrupted", "stale"):
            if not found:
                action = "its weights were loaded again"
            elif before < version:
                action = f"rolled back to version {before}"
                session.roll_back(version, before, f"{fault.cause}: {fault.detail}")
                del self._copies[version]
                self._scheduler.weight_updater.record_weight_version_after_update(str(before))
            else:
                action = "its weights were loaded again, and something changes them: restart SGLang on its drafter"
            self._restore(self._copies[session.version])
        elif fault.cause == "cache":
            action = "its prefix cache is emptied once no request runs"
        else:
            action = "SGLang drafts on with it: restart it on its drafter"
        session.flush_due = True  # rows of the prefix cache may come from what was wrong
        if found > 1:  # it has been told, and what was done did not help
            return
        session.note_fault(version=version, cause=fault.cause, detail=fault.detail, action=action)
        logger.warning("the drafter of version %d is %s: %s; %s", version, fault.cause, fault.detail, action)

    @torch.no_grad()
    def _restore(self, copies: dict[str, Tensor]) -> None:
        """Put copies into the tensors in place, where CUDA graphs read them, once nothing runs that reads them."""
        torch.get_device_module(self._worker.draft_runner.device).synchronize()
        for name, tensor in self._tensors()[0].items():
            tensor.copy_(copies[name])
        self._rows.clear()
