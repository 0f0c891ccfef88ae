"""Verification rules: how the target's logits settle which drafted nodes stand.

A rule is lossless when the law of the delivered text is the target's own, whatever tree was drafted. It sees the
target's logits at the root and at every node (`N + 1` columns, see `aurora_rl.trees`) and returns the accepted nodes
and the bonus token, the target's own next token after them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import ClassVar, NamedTuple, TypeVar, final

import torch
from torch import Tensor

from aurora_rl.trees import last_accepted, walk

# ---------------------------------------------------------------------------------------------------------------------
# Sampling parameters
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request wants its tokens drawn from the target.

    Attributes:
        temperature: Divides the logits; 0 means greedy, whatever the other fields say.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        top_p: Keep the smallest set of likeliest tokens whose mass reaches this; 1.0 keeps all.
        seed: Key of the request's noise. The same seed, prompt and parameters give the same text.

    Raises:
        ValueError: If a field is out of its range.

    >>> SamplingParams(temperature=0.7, top_p=0.9, seed=5)
    SamplingParams(temperature=0.7, top_k=0, top_p=0.9, seed=5)
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what no sampler could serve."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature is {self.temperature}; give a finite number >= 0 (0 decodes greedily)")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; give a number >= 0 (0 turns it off)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; give a number with 0 < top_p <= 1 (1.0 turns it off)")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; give a number with 0 <= seed < 2**63")


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The sampling parameters of a batch of slots, one tensor of shape `[B]` for each.

    Attributes:
        temperature: float32.
        top_k: int64.
        top_p: float32.
        seed: int64.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seed: Tensor

    @classmethod
    def from_params(
        cls, params: Sequence[SamplingParams | None], device: torch.device | str | None = None
    ) -> SamplingBatch:
        """Stack the parameters of the slots; None, an empty slot, decodes greedily.

        >>> SamplingBatch.from_params([SamplingParams(temperature=1.0, seed=3), None]).seed
        tensor([3, 0])
        """
        filled = [each or SamplingParams() for each in params]
        return cls(
            temperature=torch.tensor([each.temperature for each in filled], dtype=torch.float32, device=device),
            top_k=torch.tensor([each.top_k for each in filled], dtype=torch.int64, device=device),
            top_p=torch.tensor([each.top_p for each in filled], dtype=torch.float32, device=device),
            seed=torch.tensor([each.seed for each in filled], dtype=torch.int64, device=device),
        )


# ---------------------------------------------------------------------------------------------------------------------
# The served distribution
# ---------------------------------------------------------------------------------------------------------------------

# Sorting a vocabulary of 49k costs about 5 ms a row on a CPU core, its likeliest thousand about 0.3 ms, and they
# nearly always hold the nucleus.
_NUCLEUS_WIDTH = 1024


def _top_k(scores: Tensor, top_k: Tensor) -> Tensor:
    """Drop what is below the k-th score of each row; ties with it stay. `scores` is `[R, V]`, `top_k` `[R]`, >= 1."""
    best = scores.topk(int(top_k.max()), dim=-1).values
    return scores.masked_fill(scores < best.gather(1, top_k[:, None] - 1), -math.inf)


def _top_p(scores: Tensor, top_p: Tensor, width: int) -> Tensor:
    """Keep the nucleus of each row, looking for it among the `width` likeliest. `scores` is `[R, V]`, `top_p` `[R]`."""
    head = scores.topk(width, dim=-1).values.double()
    # In float64, so that the order in which a device adds never decides over a token at the edge.
    chance = (head - scores.double().logsumexp(-1, keepdim=True)).exp()
    size = (chance.cumsum(-1) - chance < top_p[:, None]).sum(-1, keepdim=True)
    edge = head.gather(1, size - 1).to(scores.dtype)
    above, tied = scores > edge, scores == edge
    spare = size - above.sum(-1, keepdim=True)
    kept = scores.masked_fill(~(above | tied & (tied.cumsum(-1) <= spare)), -math.inf)
    overflow = size[:, 0] == width
    if width < scores.shape[1] and bool(overflow.any()):
        kept[overflow] = _top_p(scores[overflow], top_p[overflow], scores.shape[1])
    return kept


def _warp(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The served scores, log-probabilities up to a constant. `logits` is `[R, V]`, the others are `[R]`."""
    vocab_size = logits.shape[1]
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Shift before dividing: at a low temperature large scores would lose the digits that order the best tokens.
    scores = (scores - scores.amax(-1, keepdim=True)).div_(temperature[:, None])
    rows = ((top_k > 0) & (top_k < vocab_size)).nonzero()[:, 0]
    if len(rows):
        scores[rows] = _top_k(scores[rows], top_k[rows])
    rows = (top_p < 1).nonzero()[:, 0]
    if len(rows):
        scores[rows] = _top_p(scores[rows], top_p[rows], min(vocab_size, _NUCLEUS_WIDTH))
    return scores


def warp_logits(
    logits: Tensor, temperature: Tensor | float, top_k: Tensor | int = 0, top_p: Tensor | float = 1.0
) -> Tensor:
    """Log-probabilities of the distribution that is served: temperature, then top-k, then top-p.

    The order is that of Hugging Face and vLLM. Top-k keeps every token that ties with the k-th, as both do. Top-p
    keeps the fewest tokens whose mass reaches `top_p`, at least one; of tokens with equal scores at its edge the
    lowest ids stay. The result is therefore a function of the values alone.

    Args:
        logits: `[..., V]`, floating.
        temperature: > 0; a number, or a tensor that broadcasts to `[...]`. As all three.
        top_k: 0 keeps all.
        top_p: 1.0 keeps all.

    Returns:
        `[..., V]`, float64 for float64 logits and float32 otherwise; -inf outside the support.

    Raises:
        ValueError: If a temperature is not positive.

    >>> warp_logits(torch.tensor([0.5, 0.3, 0.2]).log(), temperature=1.0, top_k=2).exp()
    tensor([0.6250, 0.3750, 0.0000])
    """
    given = (torch.as_tensor(each, device=logits.device) for each in (temperature, top_k, top_p))
    temperature, top_k, top_p = (each.expand(logits.shape[:-1]).reshape(-1) for each in given)
    if not bool((temperature > 0).all()):
        raise ValueError(f"temperature is {temperature.min().item()}; give > 0, and take the argmax for greedy rows")
    scores = _warp(logits.reshape(-1, logits.shape[-1]), temperature, top_k, top_p)
    return scores.log_softmax(-1).view(logits.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Counter-based noise
# ---------------------------------------------------------------------------------------------------------------------

_LOW_32_BITS = 0xFFFFFFFF
# Fractional bits of the square roots of 2 and 3: no structure in common with token ids or positions.
_LANE_SALTS = (0x6A09E667, 0xBB67AE85)


def _fold(x: Tensor, shift: int) -> Tensor:
    """In place: xor the high bits onto the low ones."""
    return x.bitwise_xor_(x >> shift)


def _multiply(x: Tensor, factor: int) -> Tensor:
    """In place: multiply modulo 2**32. `x` is int64 in 0 .. 2**32 - 1 and `factor` has 32 bits.

    A factor of 2**31 or more is taken less 2**32, the same number modulo 2**32: so no product leaves int64.
    """
    return x.mul_(factor - 2**32 if factor >= 2**31 else factor).bitwise_and_(_LOW_32_BITS)


def _hash(x: Tensor, key: Tensor | int = 0) -> Tensor:
    """In place: triple32 of C. Wellons' Hash Prospector, a bijection on 32 bits; `key` comes in after a third."""
    _fold(_multiply(_fold(x, 17), 0xED5AD4BB), 11)
    x.bitwise_xor_(key)
    return _fold(_multiply(_fold(_multiply(x, 0xAC4C1B51), 15), 0x31848BAB), 14)


def gumbel(seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise as a pure function of (request seed, absolute position, token id).

    The argmax over tokens of log-probability plus this noise is a sample of the distribution (Gumbel-max, Maddison et
    al. 2014). Being a hash of its coordinates, the noise does not depend on the batch, its order or the tree.

    Integer operations on 32-bit words lead up to the uniform number, exact on every device: seed and position are
    hashed into a 64-bit key for the row, key and token id into 32 bits h, and the uniform number is (h + 1/2) / 2**32,
    strictly inside (0, 1). The two logarithms are taken in float64 and rounded to float32, so devices whose float64
    logarithms differ in the last bit agree except where that bit decides the rounding, about once in 10**8 numbers.

    The tests hold known answers, a chi-square of the uniform numbers, and the correlation and joint chi-square of
    neighbouring tokens, positions and seeds.

    Args:
        seed: `[...]` int64, >= 0.
        position: int64 that broadcasts with `seed`, in 0 .. 2**32 - 1.
        vocab_size: Number of tokens V, at most 2**32.

    Returns:
        `[..., V]` float32, between -3.2 and 22.9.

    >>> gumbel(torch.tensor([1, 1]), torch.tensor([0, 1]), vocab_size=3)
    tensor([[ 0.3650, -0.6717,  0.6390],
            [-0.7713,  1.7553,  0.1837]])
    """
    seed, position = torch.broadcast_tensors(seed, position)
    low, high, at = (word[..., None] & _LOW_32_BITS for word in (seed, seed >> 32, position))
    # Two lanes, since 32 bits of key would make two of a long text's positions share their noise.
    lanes = _hash(low ^ torch.tensor(_LANE_SALTS, device=seed.device), key=high)
    first, second = _hash(lanes ^ at).split(1, dim=-1)
    bits = _hash(torch.arange(vocab_size, device=seed.device) ^ first, key=second)
    uniform = bits.double().add_(0.5).mul_(2.0**-32)
    return uniform.log_().neg_().log_().neg_().float()


# ---------------------------------------------------------------------------------------------------------------------
# Rules
# ---------------------------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What one round of verification settles.

    Attributes:
        accepted: `[B, N]` bool, the nodes of the accepted path.
        bonus_token: `[B]` int64, the target's own token after that path.
    """

    accepted: Tensor
    bonus_token: Tensor


class VerificationRule(ABC):
    """Decides which nodes of a drafted tree the target delivers, and the token after them.

    A rule is stateless. It gives two faces of one law: `verify` draws the outcome, `acceptance` is its probability.

    With `a(x)` the acceptance of node `x`, let `R(tree)` be the sum over the valid nodes of the product of `a` along
    the path from the root: the expected number of accepted nodes given the tree. For every rule, and trees drawn from
    `q(tree)`, the derivative of the expected number of accepted nodes with respect to the drafter is

        grad E[accepted] = E[R * grad log q(tree) + grad R]

    where `grad R` flows through `acceptance`. It is zero for rules whose acceptance does not look at `q`.
    The caller guarantees that the tree was drawn independently of the randomness of `verify`.
    """

    name: ClassVar[str]

    @abstractmethod
    def verify(
        self,
        logits: Tensor,
        tokens: Tensor,
        parents: Tensor,
        valid: Tensor,
        positions: Tensor,
        sampling: SamplingBatch,
    ) -> Verdict:
        """Settle one round.

        Args:
            logits: `[B, N + 1, V]` floating, the target's raw logits at the root and at every node.
            tokens: `[B, N]` int64.
            parents: `[B, N]` int64.
            valid: `[B, N]` bool, as `aurora_rl.trees.valid_nodes` gives it.
            positions: `[B]` int64, the absolute position of the root token. The choice at a node of depth d decides
                the token at position root + d + 1.
            sampling: The requests' parameters.

        Returns:
            The accepted nodes and the bonus token.

        Raises:
            ValueError: If the shapes do not belong together.
        """

    @abstractmethod
    def acceptance(self, p: Tensor, q: Tensor | None, tokens: Tensor, parents: Tensor, valid: Tensor) -> Tensor:
        """Probability that each node is accepted, given the drawn tree and that its parent was accepted.

        Args:
            p: `[B, N + 1, V]`, probabilities of the served distribution at the root and at every node.
            q: `[B, N, V]`, the distributions from which the drafter drew each node, or None if the rule ignores them.
            tokens: `[B, N]` int64.
            parents: `[B, N]` int64.
            valid: `[B, N]` bool.

        Returns:
            `[B, N]` in the dtype of `p`, differentiable in `q`; 0 at invalid nodes.
        """


RULES: dict[str, type[VerificationRule]] = {}

_Rule = TypeVar("_Rule", bound=type[VerificationRule])


def register_rule(rule: _Rule) -> _Rule:
    """Class decorator that makes a rule known to `get_rule` by its `name`.

    Raises:
        ValueError: If another class has the name.
    """
    if RULES.setdefault(rule.name, rule) is not rule:
        raise ValueError(f"the rule name {rule.name!r} belongs to {RULES[rule.name].__qualname__}; choose another")
    return rule


def get_rule(name: str) -> type[VerificationRule]:
    """Look a rule up by name.

    Raises:
        ValueError: If no rule has the name; the message lists those there are, the nearest first.

    >>> get_rule("greedy")().name
    'greedy'
    """
    if name not in RULES:
        near = sorted(RULES, key=lambda known: (-SequenceMatcher(None, name, known).ratio(), known))
        raise ValueError(f"no verification rule is called {name!r}; choose one of {', '.join(near)}")
    return RULES[name]


def _check_shapes(logits: Tensor, tokens: Tensor, parents: Tensor, valid: Tensor) -> None:
    batch_size, num_nodes = tokens.shape
    if logits.shape[:2] != (batch_size, num_nodes + 1) or not tokens.shape == parents.shape == valid.shape:
        raise ValueError(
            "expected logits [B, N + 1, V] and tokens, parents, valid [B, N], got "
            f"{list(logits.shape)}, {list(tokens.shape)}, {list(parents.shape)}, {list(valid.shape)}"
        )


def settle(choices: Tensor, tokens: Tensor, parents: Tensor, valid: Tensor) -> Verdict:
    """Turn the target's choices into a verdict: walk to the deepest node they agree with, take the bonus there.

    Args:
        choices: `[B, N + 1]` int64, the target's choice at the root and after every node.
        tokens: `[B, N]` int64.
        parents: `[B, N]` int64.
        valid: `[B, N]` bool.

    >>> tokens, parents = torch.tensor([[4, 6]]), torch.tensor([[-1, 0]])
    >>> settle(torch.tensor([[4, 7, 9]]), tokens, parents, torch.ones(1, 2, dtype=torch.bool))
    Verdict(accepted=tensor([[ True, False]]), bonus_token=tensor([7]))
    """
    accepted = walk(tokens, parents, valid, choices)
    return Verdict(accepted, choices.gather(1, last_accepted(accepted)[:, None])[:, 0])


def descend(
    choose: Callable[[Tensor, Tensor, Tensor], Tensor],
    tokens: Tensor,
    parents: Tensor,
    valid: Tensor,
    positions: Tensor,
) -> Verdict:
    """Settle a round by choosing at the nodes that the walk visits, and at no other.

    Choosing is the dear part of a sampled round, and a tree has many nodes off the path.

    Args:
        choose: Called with slots, columns and absolute positions, each `[S]` int64, `S <= B`; returns the target's
            choice there, `[S]` int64, the token at that position. What it draws at one position of a slot must not
            depend on the column otherwise than through the distribution there.
        tokens: `[B, N]` int64.
        parents: `[B, N]` int64.
        valid: `[B, N]` bool.
        positions: `[B]` int64, the absolute position of the root token.
    """
    batch_size, num_nodes = tokens.shape
    choices = tokens.new_full((batch_size, num_nodes + 1), -1)
    slots = torch.arange(batch_size, device=tokens.device)
    column = torch.zeros_like(slots)
    # Every turn takes each remaining slot one node deeper. The bonus of a path of all nodes needs the last turn.
    for depth in range(num_nodes + 1):
        visited = column[slots]
        choices[slots, visited] = choose(slots, visited, positions[slots] + depth + 1)
        reached = last_accepted(walk(tokens, parents, valid, choices))
        slots = (reached != column).nonzero()[:, 0]
        column = reached
        if not len(slots):
            break
    return settle(choices, tokens, parents, valid)


def _at_parent(values: Tensor, tokens: Tensor, parents: Tensor, valid: Tensor) -> Tensor:
    """`values[b, column of the parent, token]` of every node, 0 at invalid ones. `[B, N + 1, V]` to `[B, N]`."""
    slots = torch.arange(len(tokens), device=tokens.device)[:, None]
    # Invalid nodes may hold any number, so they must not index.
    columns, ids = torch.where(valid, parents + 1, 0), torch.where(valid, tokens, 0)
    return torch.where(valid, values[slots, columns, ids], 0.0)


@final
@register_rule
class Greedy(VerificationRule):
    """The target's argmax at every node; of equal logits the lowest id, which `torch.argmax` guarantees.

    Positions and sampling parameters are not read.

    >>> logits = torch.tensor([[[0.0, 2.0, 1.0], [3.0, 0.0, 3.0]]])
    >>> tokens, parents, valid = torch.tensor([[1]]), torch.tensor([[-1]]), torch.tensor([[True]])
    >>> Greedy().verify(logits, tokens, parents, valid, torch.tensor([7]), SamplingBatch.from_params([None]))
    Verdict(accepted=tensor([[True]]), bonus_token=tensor([0]))
    """

    name = "greedy"

    def verify(
        self,
        logits: Tensor,
        tokens: Tensor,
        parents: Tensor,
        valid: Tensor,
        positions: Tensor,
        sampling: SamplingBatch,
    ) -> Verdict:
        """See `VerificationRule.verify`."""
        _check_shapes(logits, tokens, parents, valid)
        return settle(logits.argmax(-1), tokens, parents, valid)

    def acceptance(self, p: Tensor, q: Tensor | None, tokens: Tensor, parents: Tensor, valid: Tensor) -> Tensor:
        """1 where the node carries the likeliest token after its parent, else 0. See `VerificationRule.acceptance`."""
        best = torch.zeros_like(p).scatter_(-1, p.argmax(-1, keepdim=True), 1.0)
        return _at_parent(best, tokens, parents, valid)


@final
@register_rule
class SampleAndMatch(VerificationRule):
    """Sample the target at the nodes that the walk visits; go to the child that carries the sample.

    All nodes at one absolute position share the noise of that position, `gumbel(seed, position)`. The token at a
    position is then a function of the text before it and of the seed alone: the text equals that of plain sampling
    with the same seed, token by token, whatever was drafted. Requests with temperature 0 are decoded greedily in the
    same batch, and for them `p` in `acceptance` is the point mass on the argmax.

    The text never depends on the tree, but `acceptance` holds only for trees drawn without sight of this noise: a
    drafter that samples needs a key of its own.

    >>> logits = torch.zeros(1, 2, 4)
    >>> tokens, parents, valid = torch.tensor([[3]]), torch.tensor([[-1]]), torch.tensor([[True]])
    >>> sampling = SamplingBatch.from_params([SamplingParams(temperature=1.0, seed=5)])
    >>> SampleAndMatch().verify(logits, tokens, parents, valid, torch.tensor([7]), sampling)
    Verdict(accepted=tensor([[True]]), bonus_token=tensor([2]))
    """

    name = "sample_and_match"

    def verify(
        self,
        logits: Tensor,
        tokens: Tensor,
        parents: Tensor,
        valid: Tensor,
        positions: Tensor,
        sampling: SamplingBatch,
    ) -> Verdict:
        """See `VerificationRule.verify`."""
        _check_shapes(logits, tokens, parents, valid)

        def choose(slots: Tensor, columns: Tensor, at: Tensor) -> Tensor:
            rows = logits[slots, columns]
            choice = rows.argmax(-1)
            drawn = (sampling.temperature[slots] > 0).nonzero()[:, 0]
            if len(drawn):
                these = slots[drawn]
                scores = _warp(rows[drawn], sampling.temperature[these], sampling.top_k[these], sampling.top_p[these])
                noise = gumbel(sampling.seed[these], at[drawn], logits.shape[-1])
                choice[drawn] = (scores + noise).argmax(-1)
            return choice

        return descend(choose, tokens, parents, valid, positions)

    def acceptance(self, p: Tensor, q: Tensor | None, tokens: Tensor, parents: Tensor, valid: Tensor) -> Tensor:
        """The target's probability of the node's token after its parent. See `VerificationRule.acceptance`."""
        return _at_parent(p, tokens, parents, valid)
