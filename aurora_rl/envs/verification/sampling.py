"""How a request's tokens are drawn: the distribution that is served, and noise that replays."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Sorting a vocabulary of 49k costs about 5 ms a row on a CPU core, its likeliest thousand about 0.3 ms, and they
# nearly always hold the nucleus.
_NUCLEUS_WIDTH = 1024


def _top_p(scores: Tensor, top_p: Tensor, width: int) -> Tensor:
    """Keep the nucleus of each row of `[R, V]`, looking for it among the `width` likeliest. `top_p` is `[R]`."""
    head = scores.topk(width, dim=-1).values.double()
    # In float64, so that the order in which a device adds never decides over a token at the edge.
    chance = (head - scores.double().logsumexp(-1, keepdim=True)).exp()
    # At least one, also of rows that are not numbers, which stay so.
    size = (chance.cumsum(-1) - chance < top_p[:, None]).sum(-1, keepdim=True).clamp(min=1)
    edge = head.gather(1, size - 1).to(scores.dtype)
    above, tied = scores > edge, scores == edge
    spare = size - above.sum(-1, keepdim=True)
    kept = scores.masked_fill(~(above | tied & (tied.cumsum(-1) <= spare)), -math.inf)
    overflow = size[:, 0] == width
    if width < scores.shape[1] and bool(overflow.any()):
        kept[overflow] = _top_p(scores[overflow], top_p[overflow], scores.shape[1])
    return kept


def warp(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Return the served scores, log-probabilities up to a constant: temperature, then top-k, then top-p.

    The order is that of Hugging Face and vLLM. Top-k keeps every token that ties with the k-th, as both do. Top-p
    keeps the fewest tokens whose mass reaches `top_p`, at least one; of equal scores at its edge the lowest ids stay.

    Args:
        logits: Logits, `[R, V]` floating.
        temperature: Temperature of each row, `[R]`, > 0.
        top_k: Number of tokens to keep in each row, `[R]` int64; 0 keeps all.
        top_p: Mass of the nucleus of each row, `[R]`; 1.0 keeps all.

    Returns:
        `[R, V]`, float64 for float64 logits and float32 otherwise; -inf outside the support.
    """
    vocab_size = logits.shape[1]
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Shift before dividing: at a low temperature large scores would lose the digits that order the best tokens.
    scores = (scores - scores.amax(-1, keepdim=True)).div_(temperature[:, None])
    rows = ((top_k > 0) & (top_k < vocab_size)).nonzero()[:, 0]
    if len(rows):
        limited = scores[rows]
        edge = limited.topk(int(top_k[rows].max())).values.gather(1, top_k[rows, None] - 1)
        scores[rows] = limited.masked_fill(limited < edge, -math.inf)  # what ties with the k-th stays
    rows = (top_p < 1).nonzero()[:, 0]
    if len(rows):
        scores[rows] = _top_p(scores[rows], top_p[rows], min(vocab_size, _NUCLEUS_WIDTH))
    return scores


def argmax(scores: Tensor) -> Tensor:
    """Return the index of the largest of each row, the first of equals: `[..., V]` to `[...]` int64.

    `Tensor.argmax` gives the same and takes, on a CPU in bfloat16, five to ten times as long.

    >>> argmax(torch.tensor([[1.0, 3.0, 3.0]]))
    tensor([1])
    """
    return scores.max(-1).indices


def served_log_probs(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, tokens: Tensor | None = None
) -> Tensor:
    """Return the log-probabilities of `warp`, and the point mass on the argmax where the temperature is 0.

    The arguments are those of `warp`, except that a temperature may be 0, and `tokens` `[T]` int64, the only tokens
    asked for; None is all.

    Returns:
        `[R, T]`, not renormalised, or `[R, V]`; float64 for float64 logits and float32 otherwise; -inf outside the
        support. A row of logits that has no finite largest is not a number throughout.

    >>> ones = torch.ones(2)
    >>> served_log_probs(torch.tensor([[0.0, 2.0], [0.0, 0.0]]), torch.tensor([0.0, 1.0]), 0 * ones.long(), ones).exp()
    tensor([[0.0000, 1.0000],
            [0.5000, 0.5000]])
    """
    columns = torch.arange(logits.shape[-1], device=logits.device) if tokens is None else tokens
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p = torch.full((len(logits), len(columns)), -math.inf, dtype=dtype, device=logits.device)
    best = logits.max(-1)
    log_p.masked_fill_(columns == best.indices[:, None], 0.0).masked_fill_(~best.values.isfinite()[:, None], math.nan)
    drawn = temperature > 0
    if bool(drawn.any()):
        scores = warp(logits[drawn], temperature[drawn], top_k[drawn], top_p[drawn]).log_softmax(-1)
        log_p[drawn] = scores if tokens is None else scores[:, tokens]
    return log_p


_LOW_32_BITS = 0xFFFFFFFF
# Fractional bits of the square roots of 2 and 3: no structure in common with token ids or positions.
_LANE_SALTS = (0x6A09E667, 0xBB67AE85)
# The golden ratio's, by which streams are told apart.
_STREAM_STEP = 0x9E3779B9


def _fold(x: Tensor, shift: int) -> Tensor:
    """Xor the high bits onto the low ones, in place."""
    return x.bitwise_xor_(x >> shift)


def _multiply(x: Tensor, factor: int) -> Tensor:
    """Multiply modulo 2**32, in place. `x` is int64 in 0 .. 2**32 - 1 and `factor` has 32 bits."""
    # A factor of 2**31 or more is taken less 2**32, so that no product leaves int64.
    return x.mul_(factor - 2**32 if factor >= 2**31 else factor).bitwise_and_(_LOW_32_BITS)


def _hash(x: Tensor, key: Tensor | int = 0) -> Tensor:
    """Hash in place by triple32 of C. Wellons' Hash Prospector, a bijection on 32 bits; `key` enters after a third."""
    _fold(_multiply(_fold(x, 17), 0xED5AD4BB), 11)
    x.bitwise_xor_(key)
    return _fold(_multiply(_fold(_multiply(x, 0xAC4C1B51), 15), 0x31848BAB), 14)


def uniform(seed: Tensor, position: Tensor, token: Tensor, stream: int = 0) -> Tensor:
    """Return uniform numbers in (0, 1) as a pure function of (request seed, absolute position, token id).

    The noise is a hash of its coordinates, by integers, hence the same on every device and in any batch or tree. Seed
    and position are hashed into a 64-bit key, key and token id into 32 bits h. The number is (h + 1/2) / 2**32.

    Args:
        seed: Seeds, int64, >= 0.
        position: Positions, int64 that broadcast with `seed`, in 0 .. 2**32 - 1.
        token: Token ids, int64 that broadcast with both, in 0 .. 2**32 - 1.
        stream: Number of the stream. Streams are independent of each other at the same coordinates.

    Returns:
        float64 of the broadcast shape.

    >>> uniform(torch.tensor(1), torch.tensor(0), torch.arange(3))
    tensor([0.4995, 0.1412, 0.5899], dtype=torch.float64)
    """
    low, high, at = seed & _LOW_32_BITS, seed >> 32 & _LOW_32_BITS, position & _LOW_32_BITS
    # Two lanes, since 32 bits of key would make two of a long text's positions share their noise.
    first, second = (
        _hash(_hash(low ^ (salt + stream * _STREAM_STEP & _LOW_32_BITS), key=high) ^ at) for salt in _LANE_SALTS
    )
    return _hash(token ^ first, key=second).double().add_(0.5).mul_(2.0**-32)


def gumbel(seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """Return standard Gumbel noise for every token, `[..., V]` float32 between -3.2 and 22.9.

    The argmax over tokens of log-probability plus this noise is a sample of the distribution (Gumbel-max, Maddison et
    al. 2014). It is -log(-log u), with u from `uniform`, whose arguments these are. Float64 logarithms of two devices
    may differ in the last bit, which decides the rounding to float32 about once in 10**8 numbers.

    >>> gumbel(torch.tensor([1, 1]), torch.tensor([0, 1]), vocab_size=3)
    tensor([[ 0.3650, -0.6717,  0.6390],
            [-0.7713,  1.7553,  0.1837]])
    """
    u = uniform(seed[..., None], position[..., None], torch.arange(vocab_size, device=seed.device))
    return u.log_().neg_().log_().neg_().float()
