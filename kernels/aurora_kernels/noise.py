"""Noise that is a function of request, position and token, and what is drawn by it: text that replays.

The argmax of a row of scores plus such noise is a sample of its distribution. So a token does not depend on the
batch or on what was drafted, and a draft is accepted if it is the token that plain decoding would have drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW_32_BITS = 0xFFFFFFFF
# Fractional bits of the square roots of 2 and 3: no structure in common with token ids or positions.
_LANE_SALTS = (0x6A09E667, 0xBB67AE85)
# The golden ratio's, by which streams are told apart.
_STREAM_STEP = 0x9E3779B9
_GROUP = 64  # columns whose largest is found together


def _fold(x: Tensor, shift: int) -> Tensor:
    """Xor the high bits onto the low ones, in place."""
    return x.bitwise_xor_(x >> shift)


def _multiply(x: Tensor, factor: int) -> Tensor:
    """Multiply modulo 2**32, in place. ``x`` is int64 in 0 .. 2**32 - 1 and ``factor`` has 32 bits.

    A factor of 2**31 or more is taken less 2**32, the same number modulo 2**32: so no product leaves int64.
    """
    return x.mul_(factor - 2**32 if factor >= 2**31 else factor).bitwise_and_(_LOW_32_BITS)


def _hash(x: Tensor, key: Tensor | int = 0) -> Tensor:
    """Hash in place by triple32 (C. Wellons, Hash Prospector), a bijection on 32 bits; ``key`` enters after a third."""
    _fold(_multiply(_fold(x, 17), 0xED5AD4BB), 11)
    x.bitwise_xor_(key)
    return _fold(_multiply(_fold(_multiply(x, 0xAC4C1B51), 15), 0x31848BAB), 14)


def uniform(seed: Tensor, position: Tensor, token: Tensor, stream: int = 0) -> Tensor:
    """Return uniform numbers in (0, 1) as a pure function of (request seed, absolute position, token id).

    The noise is a hash of its coordinates, so it does not depend on the batch, its order or the tree. It is exact on
    every device, since all operations are on 32-bit integers. Seed and position are hashed into a 64-bit key, key and
    token id into 32 bits h. The number is (h + 1/2) / 2**32.

    Args:
        seed: Seeds, int64.
        position: Positions, int64 that broadcast with ``seed``, in 0 .. 2**32 - 1.
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
    """Return standard Gumbel noise for every token, ``[..., V]`` float32 between -3.2 and 22.9.

    The argmax over tokens of log-probability plus this noise is a sample of the distribution (Gumbel-max, Maddison et
    al. 2014). The noise is -log(-log u), with u from ``uniform``, and the arguments are the same. Logarithms are
    computed in float64 and rounded to float32. The float64 logarithms of two devices may differ in the last bit, which
    decides the rounding about once in 10**8 numbers.

    >>> gumbel(torch.tensor([1, 1]), torch.tensor([0, 1]), vocab_size=3)
    tensor([[ 0.3650, -0.6717,  0.6390],
            [-0.7713,  1.7553,  0.1837]])
    """
    u = uniform(seed[..., None], position[..., None], torch.arange(vocab_size, device=seed.device))
    return u.log_().neg_().log_().neg_().float()


def gumbel_argmax(scores: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """Draw a token of each row, the same at every call: the argmax of scores plus :func:`gumbel` noise, ``[R]`` int64.

    Nothing is normalised.

    Args:
        scores: Log-probabilities up to a constant for each row, ``[R, V]``; -inf is never drawn.
        seed: Seed of each row's request, ``[R]`` int64.
        position: Absolute position of each token, ``[R]`` int64.

    >>> scores, seed = torch.tensor([[0.0, 1.0, 2.0]]).expand(4, 3), torch.tensor([1, 1, 2, 2])
    >>> gumbel_argmax(scores, seed, torch.tensor([0, 1, 0, 1]))
    tensor([2, 1, 2, 2])
    """
    return argmax(scores + gumbel(seed, position, scores.shape[-1]))


def argmax(scores: Tensor) -> Tensor:
    """Return the index of the largest of each row, the first of equals: ``[..., V]`` to ``[...]`` int64.

    ``Tensor.argmax`` gives the same. On a CPU it compares number by number, while a largest value is found by vectors:
    that of each group of columns first, then the group, then the column.

    >>> argmax(torch.tensor([[1.0, 3.0, 3.0]]))
    tensor([1])
    """
    if scores.device.type != "cpu" or scores.shape[-1] % _GROUP:
        return scores.max(-1).indices
    groups = scores.unflatten(-1, (-1, _GROUP))
    best = groups.amax(-1).max(-1).indices
    within = groups.take_along_dim(best[..., None, None], -2)[..., 0, :].max(-1).indices
    return best * _GROUP + within
