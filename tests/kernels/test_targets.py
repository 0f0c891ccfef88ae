"""Every target's log-probabilities against a plain reading of its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from aurora_kernels import HeadTarget, LogProbTarget, Target, TopKTarget

N, V, H = 7, 23, 5
VOCAB = torch.tensor([1, 2, 5, 11, 22])
ROWS = [slice(2, 5), torch.tensor([6, 0, 3])]


def head(**extra: object) -> HeadTarget:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, H, dtype=torch.float64, generator=generator) for n in (N, V))
    return HeadTarget(hidden, weight, **extra)  # type: ignore[arg-type]


def plain_logits(target: HeadTarget) -> Tensor:
    logits = target.hidden @ target.weight.T
    if target.bias is not None:
        logits = logits + target.bias
    logits = logits * target.scale
    return logits if target.softcap is None else target.softcap * torch.tanh(logits / target.softcap)


def on_vocab(logits: Tensor, vocab: Tensor | None, renormalize: bool, temperature: float) -> Tensor:
    log_p = (logits / temperature).log_softmax(-1)
    if vocab is not None:
        log_p = log_p[:, vocab]
    return log_p.log_softmax(-1) if renormalize else log_p


def forms() -> list[tuple[Target, Tensor]]:
    """Targets, each with logits of its whole law."""
    bias = torch.linspace(-1, 1, V, dtype=torch.float64)
    heads = [head(), head(bias=bias, scale=0.5, softcap=2.0)]
    whole = plain_logits(heads[0]).log_softmax(-1)
    kept = whole.masked_fill(whole < whole.topk(18, dim=-1).values[:, -1:], -math.inf).log_softmax(-1)
    top = whole.topk(4, dim=-1)
    tail = torch.log1p(-top.values.exp().sum(-1))
    spread = (tail - math.log(V - 4))[:, None].expand(N, V).scatter(1, top.indices, top.values)
    likeliest = TopKTarget(top.indices, top.values, tail, V)
    everything = whole.topk(V, dim=-1)
    no_tail = TopKTarget(everything.indices, everything.values, torch.full((N,), -math.inf), V)
    return [
        *((each, plain_logits(each)) for each in heads),
        (LogProbTarget(whole), whole),
        (LogProbTarget(kept), kept),
        (likeliest, spread),
        (no_tail, whole),
    ]


@pytest.mark.parametrize("rows", ROWS, ids=["slice", "numbers"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("vocab", [None, VOCAB], ids=["whole", "draft"])
@pytest.mark.parametrize("form", range(6))
def test_rows_of_a_target(
    form: int, vocab: Tensor | None, renormalize: bool, temperature: float, rows: slice | Tensor
) -> None:
    target, logits = forms()[form]
    got = target.reader(vocab, renormalize=renormalize, temperature=temperature)(rows)
    expected = on_vocab(logits, vocab, renormalize, temperature)[rows]
    assert len(target) == N
    torch.testing.assert_close(got, expected)


def test_log_probabilities_of_the_draft_vocabulary_alone() -> None:
    log_p = on_vocab(plain_logits(head()), VOCAB, False, 1.0)
    plain, renormalized = (
        LogProbTarget(log_p).reader(None, renormalize=each, temperature=1.0)(slice(None)) for each in (False, True)
    )
    assert torch.equal(plain, log_p)
    torch.testing.assert_close(renormalized, log_p.log_softmax(-1))


def test_a_draft_vocabulary_with_none_of_the_likeliest_tokens_shares_a_tail_of_no_mass() -> None:
    target = TopKTarget(torch.tensor([[0]]), torch.tensor([[0.0]]), torch.tensor([-math.inf]), V)
    got = target.reader(VOCAB, renormalize=True, temperature=1.0)(slice(None))
    torch.testing.assert_close(got.exp(), torch.full((1, 5), 0.2))


def test_the_product_is_in_the_heads_dtype_and_the_rest_in_float32() -> None:
    target = HeadTarget(head().hidden, head().weight.bfloat16())
    got = target.reader(None, renormalize=True, temperature=1.0)(slice(None))
    logits = target.hidden.bfloat16() @ target.weight.T
    assert torch.equal(got, logits.log_softmax(-1, dtype=torch.float32))


def test_hidden_states_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \[n, H\] and its weight \[V, H\], got \[7, 4\] and \[23, 5\]"):
        HeadTarget(torch.zeros(7, 4), torch.zeros(23, 5))
