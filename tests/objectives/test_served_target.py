"""The served distribution by chunks of rows: it is the dense one by its definition, in values, masks and gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tiny_drafters import noisy_drafter_and_head
from tiny_recordings import trajectory_of
from torch import Tensor
from whole_logits import with_whole_logits

from aurora_kernels import rows as kernel_rows
from aurora_kernels.rows import Rows
from aurora_kernels.targets import Reader
from aurora_rl.envs import SamplingParams
from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives import Objective, Windows, forward_kl, get_objective, register_objective, served_target
from aurora_rl.objectives.served_target import ServedTarget
from aurora_rl.policies import Drafter, Eagle3Drafter, MedusaDrafter, TreeShape
from aurora_rl.trajectories import pack, rule_code

EVEN = torch.arange(0, 32, 2)
SERVED = [
    ("greedy", SamplingParams()),
    ("rejection", SamplingParams(temperature=0.7)),
    ("sample_and_match", SamplingParams(temperature=1.3, top_k=3)),
    ("rejection", SamplingParams(temperature=0.8, top_p=0.5)),
    ("rejection", SamplingParams(temperature=2.0, top_k=9, top_p=0.8, min_p=0.5)),
    ("sample_and_match", SamplingParams(temperature=1.3, min_p=0.3)),
]


def dense(logits: list[float], how: SamplingParams) -> list[float]:
    """The log-probabilities of a row, token by token. No two logits are equal."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    if how.temperature == 0:
        return [0.0 if token == order[0] else -math.inf for token in range(len(logits))]
    shares = {token: math.exp((logits[token] - logits[order[0]]) / how.temperature) for token in order}
    kept = [token for token in order if shares[token] >= how.min_p][: how.top_k or None]
    mass = {token: shares[token] for token in kept}
    total, before, nucleus = sum(mass.values()), 0.0, []
    for token in kept:
        if before >= how.top_p * total:
            break
        nucleus.append(token)
        before += mass[token]
    return [math.log(mass[token] / before) if token in nucleus else -math.inf for token in range(len(logits))]


@dataclass(frozen=True, eq=False)
class Dense:
    """A target of all rows and tokens, read at the even ones, which are the draft vocabulary."""

    log_p: Tensor
    fill: bool

    def __len__(self) -> int:
        return len(self.log_p)

    def covered(self) -> Tensor:
        return self.log_p[:, EVEN].isfinite().any(-1)

    def reader(self, draft_vocab: None, *, renormalize: bool, temperature: float) -> Reader:
        log_p = self.log_p[:, EVEN].clone()
        if self.fill:
            log_p[~self.covered()] = -math.log(len(EVEN))
        return lambda rows: (log_p - log_p.logsumexp(-1, keepdim=True) if renormalize else log_p)[rows]


def served_densely(
    self: Objective,
    batch: TensorDictBase,
    rows: TensorDictBase,
    request: Tensor,
    *,
    greedy: bool = False,
    fill: bool = False,
) -> Dense:
    """In place of ``Objective.served_target``."""
    logits = (rows["hidden"] @ self.head.weight.T).tolist()
    how = [SamplingParams() if greedy else SERVED[i][1] for i in request.tolist()]
    log_p = torch.tensor([dense(*each) for each in zip(logits, how, strict=True)], dtype=torch.float64)
    return Dense(log_p.view(-1, len(self.head)), fill)


def target_of(count: int = 40, fill: bool = False, vocab: int = 32) -> tuple[ServedTarget, Dense]:
    """Random rows that were served in every way, and the dense distribution of them."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (count, vocab))
    ways = [SERVED[row % len(SERVED)][1] for row in range(count)]
    temperature, top_p, min_p = (
        torch.tensor([getattr(how, key) for how in ways]) for key in ("temperature", "top_p", "min_p")
    )
    target = ServedTarget(
        TensorDict({"hidden": hidden}, batch_size=[count]),
        TargetHead(weight), EVEN, temperature, torch.tensor([how.top_k or 0 for how in ways]), top_p, min_p, fill=fill,
    )  # fmt: skip
    rows = [dense(row, how) for row, how in zip((hidden @ weight.T).tolist(), ways, strict=True)]
    return target, Dense(torch.tensor(rows, dtype=torch.float64), fill)


def rows_of_a_chunk(monkeypatch: pytest.MonkeyPatch, fewest: int) -> None:
    monkeypatch.setattr(kernel_rows, "_FEWEST", fewest)
    monkeypatch.setitem(kernel_rows._CHUNK, "cpu", 1)


@pytest.mark.parametrize("fewest", [3, 128])
@pytest.mark.parametrize("rows", [slice(0, 40), slice(7, 21), torch.tensor([39, 3, 4, 20]), slice(5, 5)], ids=str)
@pytest.mark.parametrize(("fill", "renormalize"), [(False, False), (True, False), (True, True)])
def test_it_reads_the_dense_rows(
    rows: Rows, fill: bool, renormalize: bool, fewest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, expected = target_of(fill=fill)
    rows_of_a_chunk(monkeypatch, fewest)
    monkeypatch.setattr(served_target, "_KEPT", 4)
    read, of_dense = (each.reader(None, renormalize=renormalize, temperature=1.0) for each in (target, expected))
    for part in (rows, slice(10, 30), rows):  # for the first time, some again, and again
        torch.testing.assert_close(read(part), of_dense(part))
    assert 0 < int(expected.covered().sum()) < len(expected), "the case must have rows of both kinds"


@pytest.mark.parametrize("fewest", [3, 128])
def test_rows_are_covered_if_a_token_of_them_can_be_drawn(fewest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    target, expected = target_of()
    rows_of_a_chunk(monkeypatch, fewest)
    assert torch.equal(target.covered(), expected.covered())
    every = torch.arange(32)
    how = target.temperature, target.top_k, target.top_p, target.min_p
    whole = ServedTarget(target.outputs, target.head, every, *how)
    assert bool(whole.covered().all())


def test_what_is_not_a_number_counts_and_stays_so() -> None:
    target, _ = target_of(fill=True)
    target.outputs["hidden"][3:6] = torch.nan
    assert bool(target.covered()[3:6].all())
    for renormalize in (True, False, True, False):
        log_p = target.reader(None, renormalize=renormalize, temperature=1.0)(slice(2, 7))
        assert log_p.isnan().all(-1).tolist() == [False, True, True, True, False]


def test_a_temperature_that_rounds_to_a_point_mass_covers_what_it_draws() -> None:
    target, _ = target_of()
    logits = (target.outputs["hidden"] @ target.head.weight.T).float()
    target = ServedTarget(
        TensorDict({"hidden": logits}, batch_size=[40]), TargetHead(torch.eye(32)), EVEN,
        torch.full((40,), 1e-40), torch.zeros(40, dtype=torch.int64), torch.ones(40), torch.zeros(40),
    )  # fmt: skip
    assert torch.equal(target.covered(), logits.argmax(-1) % 2 == 0)


def test_the_whole_head_is_multiplied_once_with_rows_that_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A nucleus of more tokens than are kept is read by it every time."""
    monkeypatch.setattr(served_target, "_KEPT", 8)
    target, _ = target_of()
    target.top_p[4::6], target.top_k[4::6], target.temperature[4::6] = 0.999, 0, 50.0  # wide
    target.min_p[4::6] = 0.0
    seen, multiplied = [], ServedTarget._multiplied
    monkeypatch.setattr(ServedTarget, "_multiplied", lambda *args: seen.extend(args[1].tolist()) or multiplied(*args))
    unlimited, wide = list(range(1, 40, 6)), list(range(4, 40, 6))
    for read, expected in (
        (lambda: target.reader(None, renormalize=True, temperature=1.0)(torch.tensor(unlimited)), []),
        (target.covered, [row for row in range(40) if row % 6 != 1]),
        (lambda: target.reader(None, renormalize=True, temperature=1.0)(slice(0, 40)), wide),
        (lambda: target.reader(None, renormalize=False, temperature=1.0)(slice(0, 40)), sorted(unlimited + wide)),
        (lambda: target.reader(None, renormalize=False, temperature=1.0)(slice(0, 40)), wide),
    ):
        seen.clear()
        read()
        assert seen == expected


def test_another_temperature_or_vocabulary_is_refused() -> None:
    target, _ = target_of()
    for draft_vocab, temperature in ((None, 2.0), (EVEN, 1.0)):
        with pytest.raises(
            ValueError, match="a served distribution has its own draft vocabulary .*; set draft_vocab=None"
        ):
            target.reader(draft_vocab, renormalize=True, temperature=temperature)


def test_products_are_in_autocasts_dtype_wherever_rows_are_read() -> None:
    def target() -> ServedTarget:
        double, _ = target_of()
        outputs, head = double.outputs.float(), TargetHead(double.head.weight.float())
        return ServedTarget(outputs, head, EVEN, double.temperature, double.top_k, double.top_p, double.min_p)

    options: dict[str, Any] = {"renormalize": False, "temperature": 1.0}
    with torch.autocast("cpu", torch.bfloat16):
        read, expected = target().reader(None, **options), target().reader(None, **options)(slice(0, 40))
    assert torch.equal(read(slice(0, 40)), expected)
    assert not torch.equal(target().reader(None, **options)(slice(0, 40)), expected)


def served_kl(log_p: Tensor, log_q: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    return forward_kl(log_p, log_q), windows.valid


@cache
def batch_of(kind: type[Drafter]) -> TensorDict:
    drafter, _ = noisy_drafter_and_head(kind)
    batch = pack([
        trajectory_of(drafter, sampling_params=how, shape=TreeShape(3, 2), request=i)
        for i, (_, how) in enumerate(SERVED)
    ])  # fmt: skip
    batch["sampling", "rule"] = torch.tensor([rule_code(rule) for rule, _ in SERVED])
    return batch


OBJECTIVES: list[tuple[str, dict[str, Any]]] = [
    ("imitation", {"target": "served", "steps": 2}),
    ("imitation", {"target": "served", "divergence": "negative_log_overlap"}),
    ("discard", {"target": "served", "weighting": "decay"}),
    ("discard", {"target": "served", "divergence": "total_variation", "top_k": 4}),
    ("expected_length", {"steps": 2}),
    ("expected_length", {"contexts": "trees"}),
    ("expected_length", {"steps": 2, "rule": "greedy"}),
    ("served_kl", {"target": "served", "renormalize": False}),
]


@pytest.mark.parametrize(("name", "settings"), OBJECTIVES, ids=str)
@pytest.mark.parametrize("kind", [Eagle3Drafter, MedusaDrafter])
def test_objectives_have_the_value_and_gradient_of_the_dense_rows(
    kind: type[Drafter], name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    register_objective("served_kl")(served_kl)
    (drafter, head), batch = noisy_drafter_and_head(kind), batch_of(kind)
    parameters, found = list(drafter.parameters()), []
    for by_chunks in (True, False):
        with monkeypatch.context() as patched:
            if by_chunks:
                rows_of_a_chunk(patched, 8)
            else:
                patched.setattr(Objective, "served_target", served_densely)
                for method in ("unroll", "context_logits"):
                    patched.setattr(drafter, method, with_whole_logits(getattr(drafter, method)))
            out = get_objective(name)(drafter, head, **settings)(batch)
            loss = out[f"loss_{name}"]
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        found.append([out.to_dict(), gradients])
    torch.testing.assert_close(*found)
    assert sum(float(each.abs().sum()) for each in found[0][1]) > 1e-3
