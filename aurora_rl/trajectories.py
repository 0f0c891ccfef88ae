"""What serving remembers of a request, and the packed trajectory that it becomes (the data layout of docs/design.md).

Legend: ``B`` slots, ``N`` padded nodes of a draft tree without its root, ``S`` tokens of a request of which ``P`` are
prompt, ``R`` rounds, ``M`` nodes of all rounds, ``F`` feature size, ``H`` hidden size, ``K`` likeliest tokens, ``V``
vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from aurora_rl.trees import reorder_depth_first

RULE_CODES = ("greedy", "sample_and_match", "rejection", "rejection_without_replacement")
"""Built-in verification rules, by their codes; see :func:`rule_code`."""
_OTHER_RULES = 2**56  # codes of other rules begin here
# How the drafter chose a tree's nodes: its likeliest, or draws, whose siblings are independent or all different.
DRAFT_MODES = ("topk", "sampled", "sampled_without_replacement")
# What stands for "hidden", beside it, where an engine gives the target's likeliest tokens and not its states.
TOPK_ENTRIES = ("topk_ids", "topk_log_probs", "tail_log_prob")


def rule_code(name: str) -> int:
    """Return the number by which trajectories record a verification rule.

    It is the place of a built-in rule in :data:`RULE_CODES`, and a checksum of the name of any other.

    Example:
        >>> rule_code("rejection"), rule_code("my_package.rules:Typical") == rule_code("my_package.rules:Typical")
        (2, True)
    """
    if name in RULE_CODES:
        return RULE_CODES.index(name)
    return _OTHER_RULES + int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])


class ContextStore:
    """Tokens, features and hidden states of every slot's request so far: the SlotContext of each slot, in one block.

    The engine appends at ``commit``; the environment and the policy read. Row ``t`` of ``features`` and ``hidden``
    belongs to token ``t``; the last committed token has been through no target pass yet and has no row.

    Args:
        num_slots: number of slots ``B``.
        max_length: most tokens (prompt and completion) that a slot can hold.
        feature_size: ``F``, width of the features that the drafter reads.
        hidden_size: ``H``, width of the output head's input.
        dtype: dtype of features and hidden states.
        device: where they live.

    Attributes:
        tokens: ``[B, max_length]`` int64.
        features: ``[B, max_length, F]``.
        hidden: ``[B, max_length, H]``, filled from position ``P - 1`` on.
        lengths: ``[B]`` int64 on the CPU; 0 where the slot is free.
        prompt_lengths: ``[B]`` int64 on the CPU.
    """

    def __init__(
        self,
        num_slots: int,
        max_length: int,
        feature_size: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_slots, self.max_length = num_slots, max_length
        self.tokens = torch.zeros(num_slots, max_length, dtype=torch.int64, device=device)
        self.features = torch.zeros(num_slots, max_length, feature_size, dtype=dtype, device=device)
        self.hidden = torch.zeros(num_slots, max_length, hidden_size, dtype=dtype, device=device)
        self.lengths = torch.zeros(num_slots, dtype=torch.int64)
        self.prompt_lengths = torch.zeros(num_slots, dtype=torch.int64)

    @property
    def occupied(self) -> Tensor:
        """Indices of the slots that hold a request, ``[b]`` int64 on the CPU."""
        return self.lengths.nonzero().flatten()

    def start(self, slot: int, prompt: Tensor) -> None:
        """Put a prompt (``[P]`` int64) into a free slot; its features follow by :meth:`write_features`."""
        self.tokens[slot, : len(prompt)] = prompt
        self.lengths[slot] = self.prompt_lengths[slot] = len(prompt)

    def append(self, slots: Tensor, tokens: Tensor, num_new: Tensor, features: Tensor, hidden: Tensor) -> None:
        """Append what a round committed.

        Args:
            slots: ``[b]`` int64.
            tokens: ``[b, D]`` new tokens, oldest first; columns from ``num_new`` on are ignored.
            num_new: ``[b]`` int64 on the CPU.
            features: ``[b, D, F]``, row ``i`` belongs to the position just before ``tokens[:, i]``.
            hidden: ``[b, D, H]``, aligned like ``features``.
        """
        start = self.lengths[slots]
        row, column = torch.where(torch.arange(tokens.shape[1]) < num_new[:, None])
        device = self.tokens.device
        where = (slots[row].to(device), (start[row] + column).to(device))
        row, column = row.to(device), column.to(device)
        self.tokens[where] = tokens[row, column]
        self.features[where[0], where[1] - 1] = features[row, column].to(self.features.dtype)
        self.hidden[where[0], where[1] - 1] = hidden[row, column].to(self.hidden.dtype)
        self.lengths[slots] = start + num_new

    def release(self, slot: int) -> None:
        """Free the slot."""
        self.lengths[slot] = self.prompt_lengths[slot] = 0


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a request was served, as the trajectory records it."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    rule: str = "greedy"
    draft_mode: str = "topk"

    def entries(self) -> dict[str, Tensor]:
        """The group "sampling" of a trajectory."""
        return {
            "temperature": torch.tensor(self.temperature, dtype=torch.float32),
            "top_k": torch.tensor(self.top_k),
            "top_p": torch.tensor(self.top_p, dtype=torch.float32),
            "seed": torch.tensor(self.seed),
            "rule": torch.tensor(rule_code(self.rule)),
            "draft_mode": torch.tensor(DRAFT_MODES.index(self.draft_mode)),
        }


@dataclass(slots=True)
class _Rounds:
    anchors: list[int] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    cache_versions: list[int] = field(default_factory=list)
    nodes: list[tuple[Tensor, ...]] = field(default_factory=list)


class TrajectoryRecorder:
    """Collects the rounds of each slot and cuts one packed trajectory when its request ends.

    Args:
        store: the engine's context store.
    """

    def __init__(self, store: ContextStore) -> None:
        self._store = store
        self._rounds: dict[int, _Rounds] = {}

    def start(self, slot: int) -> None:
        """Begin an empty record for the request that entered the slot."""
        self._rounds[slot] = _Rounds()

    def round(
        self,
        slots: Sequence[int],
        anchors: Sequence[int],
        tokens: Tensor,
        parents: Tensor,
        log_probs: Tensor,
        valid: Tensor,
        accepted: Tensor,
        hidden: Tensor,
        policy_versions: Sequence[int],
        cache_versions: Sequence[int],
    ) -> None:
        """Record one round of ``b`` slots whose trees have ``n`` padded nodes.

        Args:
            slots: the slots.
            anchors: position of each slot's root in its request.
            tokens: ``[b, n]``.
            parents: ``[b, n]``.
            log_probs: ``[b, n]``.
            valid: ``[b, n]`` bool; other nodes are left out.
            accepted: ``[b, n]`` bool.
            hidden: ``[b, n + 1, H]``, the root first.
            policy_versions: version of the weights that drafted, per slot.
            cache_versions: oldest version with rows in the drafter's cache, per slot.
        """
        columns = (tokens, parents, log_probs, accepted, hidden[:, 1:])
        for i, slot in enumerate(slots):
            record = self._rounds[slot]
            record.anchors.append(anchors[i])
            record.versions.append(policy_versions[i])
            record.cache_versions.append(cache_versions[i])
            keep = valid[i].nonzero().flatten()
            record.nodes.append((keep, *(c[i, keep] for c in columns)))

    def cut(self, slot: int, request: int, sampling: Sampling) -> TensorDict:
        """The packed trajectory of the slot's request, in memory of its own, on the CPU."""
        store, record = self._store, self._rounds.pop(slot)
        length, prompt = int(store.lengths[slot]), int(store.prompt_lengths[slot])
        trees = [_pack_tree(*nodes) for nodes in record.nodes]
        counts = torch.tensor([0] + [len(t[0]) for t in trees])
        tokens, parents, log_probs, accepted, hidden = (torch.cat(c) for c in zip(*trees, strict=True))
        return TensorDict(
            {
                "request": torch.tensor(request),
                "sequence": {
                    "tokens": store.tokens[slot, :length].cpu().clone(),
                    "prompt_length": torch.tensor(prompt),
                    "features": store.features[slot, : length - 1].cpu().clone(),
                    "hidden": store.hidden[slot, prompt - 1 : length - 1].cpu().clone(),
                },
                "rounds": {
                    "anchor": torch.tensor(record.anchors),
                    "offset": counts.cumsum(0),
                    "policy_version": torch.tensor(record.versions),
                    "cache_version": torch.tensor(record.cache_versions),
                },
                "nodes": {
                    "tokens": tokens.cpu(),
                    "parents": parents.cpu(),
                    "log_probs": log_probs.cpu(),
                    "accepted": accepted.cpu(),
                    "hidden": hidden.cpu(),
                },
                "sampling": sampling.entries(),
            },
            batch_size=[],
        )


def _pack_tree(
    keep: Tensor, tokens: Tensor, parents: Tensor, log_probs: Tensor, accepted: Tensor, hidden: Tensor
) -> tuple[Tensor, ...]:
    """One tree's valid nodes, depth-first, parents relative to the tree."""
    place = torch.full((int(keep[-1]) + 2 if len(keep) else 1,), -1, dtype=torch.int64, device=keep.device)
    place[keep] = torch.arange(len(keep), device=keep.device)
    order, parents = reorder_depth_first(torch.where(parents < 0, -1, place[parents]))
    return tokens[order], parents, log_probs[order], accepted[order], hidden[order]


_Layout = dict[tuple[str, ...], tuple[str, str]]  # of every entry: shape, dtype

_LAYOUT: _Layout = {
    ("request",): ("", "int64"),
    ("sequence", "tokens"): ("S", "int64"),
    ("sequence", "prompt_length"): ("", "int64"),
    ("sequence", "features"): ("S-1,F", "float"),
    ("rounds", "anchor"): ("R", "int64"),
    ("rounds", "offset"): ("R+1", "int64"),
    ("rounds", "policy_version"): ("R", "int64"),
    ("rounds", "cache_version"): ("R", "int64"),
    ("nodes", "tokens"): ("M", "int64"),
    ("nodes", "parents"): ("M", "int64"),
    ("nodes", "log_probs"): ("M", "float"),
    ("nodes", "accepted"): ("M", "bool"),
    ("sampling", "temperature"): ("", "float"),
    ("sampling", "top_k"): ("", "int64"),
    ("sampling", "top_p"): ("", "float"),
    ("sampling", "seed"): ("", "int64"),
    ("sampling", "rule"): ("", "int64"),
    ("sampling", "draft_mode"): ("", "int64"),
}
_LOG_PROBS = ("nodes", "log_probs")  # may be absent: an engine that drafts by argmax has no scores
# The target's outputs, in one of two forms.
_HIDDEN: _Layout = {("sequence", "hidden"): ("S-P,H", "float"), ("nodes", "hidden"): ("M,H", "float")}
_TOPK: _Layout = {
    (part, name): (rows + width, dtype)
    for part, rows in (("sequence", "S-P"), ("nodes", "M"))
    for name, width, dtype in zip(TOPK_ENTRIES, (",K", ",K", ""), ("int64", "float", "float"), strict=True)
}
# Float32 sums over a vocabulary of 1e5 are good to 1e-5; probabilities renormalised over the top K, or of another
# temperature, are off by far more.
_MASS_TOLERANCE = 1e-3


def _layout_of(trajectory: TensorDictBase) -> _Layout:
    """The layout in the form that the trajectory carries; errors as of :func:`validate`."""
    keys = {k if isinstance(k, tuple) else (k,) for k in trajectory.keys(include_nested=True, leaves_only=True)}
    states, likeliest = sorted(keys & set(_HIDDEN)), sorted(keys & set(_TOPK))
    if states and likeliest:
        raise ValueError(
            f"a trajectory has the target's outputs in one form, 'hidden' or {TOPK_ENTRIES}, in 'sequence' and 'nodes' "
            f"alike; got {states} and {likeliest}"
        )
    layout = _LAYOUT | (_TOPK if likeliest else _HIDDEN)
    if keys - {_LOG_PROBS} != set(layout) - {_LOG_PROBS}:
        missing, extra = sorted(set(layout) - keys - {_LOG_PROBS}), sorted(keys - set(layout))
        raise ValueError(f"a trajectory has exactly the entries of the layout; missing {missing}, unknown {extra}")
    return {key: what for key, what in layout.items() if key in keys}


def validate(trajectory: TensorDictBase, *, vocab_size: int, feature_size: int, hidden_size: int) -> None:
    """Check a trajectory that came over the network before anything reads it.

    Args:
        trajectory: a packed trajectory, in either form of the target's outputs, with ("nodes", "log_probs") or without.
        vocab_size: the target's; every token must lie in it.
        feature_size: ``F`` that the learner's drafter reads.
        hidden_size: ``H`` of the target.

    Raises:
        ValueError: names the first entry that is missing, mixed, misshapen, of the wrong kind or out of range.
    """
    layout, get = _layout_of(trajectory), trajectory.get
    for key, (_, kind) in layout.items():  # first of all: what follows computes with these
        dtype = get(key).dtype
        if not (dtype.is_floating_point if kind == "float" else dtype == getattr(torch, kind)):
            raise ValueError(f"{'.'.join(key)} has dtype {dtype}, expected {kind}")
    tokens, anchor, node_tokens = get(("sequence", "tokens")), get(("rounds", "anchor")), get(("nodes", "tokens"))
    prompt, topk_ids = get(("sequence", "prompt_length")), get(("sequence", "topk_ids"), None)
    for name, value in (("sequence.tokens", tokens), ("rounds.anchor", anchor), ("nodes.tokens", node_tokens)):
        if value.ndim != 1:
            raise ValueError(f"{name} has one dimension, got shape {tuple(value.shape)}")
    if prompt.ndim or not 1 <= int(prompt) < len(tokens):
        raise ValueError(f"sequence.prompt_length must lie in 1..S-1={len(tokens) - 1}, got {prompt.tolist()}")
    sizes = {
        "S": len(tokens),
        "S-1": len(tokens) - 1,
        "S-P": len(tokens) - int(prompt),
        "R": len(anchor),
        "R+1": len(anchor) + 1,
        "M": len(node_tokens),
        "F": feature_size,
        "H": hidden_size,
        "K": topk_ids.shape[-1] if topk_ids is not None and topk_ids.ndim else 0,
    }
    for key, (shape, kind) in layout.items():
        value, name = get(key), ".".join(key)
        expected = tuple(sizes[s] for s in shape.split(",")) if shape else ()
        if tuple(value.shape) != expected:
            raise ValueError(f"{name} must have shape [{shape}] = {expected}, got {tuple(value.shape)}")
        may_be_infinite = key == _LOG_PROBS or key[-1] == "tail_log_prob"
        if kind == "float" and not may_be_infinite and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} holds a value that is not finite")
    for key in (("sequence", "tokens"), ("nodes", "tokens"), *(k for k in layout if k[-1] == "topk_ids")):
        ids = get(key)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise ValueError(f"{'.'.join(key)} must lie in 0..{vocab_size - 1}, got {int(ids.min())}..{int(ids.max())}")
    if topk_ids is not None:
        for part in ("sequence", "nodes"):
            _check_topk(part, *(get((part, name)) for name in TOPK_ENTRIES))
    offset, parents = get(("rounds", "offset")), get(("nodes", "parents"))
    if int(offset[0]) != 0 or int(offset[-1]) != len(node_tokens) or bool((offset.diff() < 0).any()):
        raise ValueError(f"rounds.offset must rise from 0 to M={len(node_tokens)}, got {offset.tolist()[:8]}...")
    if len(anchor) and not int(prompt) - 1 <= int(anchor.min()) <= int(anchor.max()) < len(tokens) - 1:
        raise ValueError(f"rounds.anchor must lie in P-1..S-2, got {int(anchor.min())}..{int(anchor.max())}")
    if bool((anchor.diff() <= 0).any()):
        raise ValueError(f"rounds.anchor must rise, since every round commits a token, got {anchor.tolist()[:8]}...")
    local = torch.arange(len(parents)) - torch.repeat_interleave(offset[:-1], offset.diff())
    if bool(((parents < -1) | (parents >= local)).any()):
        raise ValueError("nodes.parents must point to an earlier node of the same tree or to the root (-1)")
    if not 0 <= (rule := int(get(("sampling", "rule")))) < len(RULE_CODES) and rule < _OTHER_RULES:
        raise ValueError(f"sampling.rule must index {RULE_CODES} or be the code of another rule, got {rule}")
    if not 0 <= int(get(("sampling", "draft_mode"))) < len(DRAFT_MODES):
        raise ValueError(f"sampling.draft_mode must index {DRAFT_MODES}, got {int(get(('sampling', 'draft_mode')))}")


def _check_topk(part: str, ids: Tensor, log_probs: Tensor, tail: Tensor) -> None:
    """The rows of "sequence" or "nodes" as distributions: ``[X, K]``, ``[X, K]``, ``[X]``."""
    if not ids.shape[1]:
        raise ValueError(f"{part}.topk_ids needs at least one token a row, got shape {tuple(ids.shape)}")
    if bool((ids.sort(-1).values.diff() == 0).any()):
        raise ValueError(f"{part}.topk_ids names a token twice in one row")
    for name, value in (("topk_log_probs", log_probs), ("tail_log_prob", tail)):
        if not bool((value <= _MASS_TOLERANCE).all()):
            raise ValueError(f"{part}.{name} must be log-probabilities, at most 0, got up to {float(value.max()):.4g}")
    mass = log_probs.double().exp().sum(-1) + tail.double().exp()
    if bool(((mass - 1).abs() > _MASS_TOLERANCE).any()):
        raise ValueError(
            f"{part}.topk_log_probs and {part}.tail_log_prob must have a mass of 1 in every row, got "
            f"{float(mass.min()):.4g}..{float(mass.max()):.4g}; give the softmax of all tokens at temperature 1"
        )


def accepted_per_round(trajectory: TensorDictBase) -> tuple[Tensor, Tensor]:
    """Accepted nodes and drafted nodes of each round, ``[R]`` and ``[R]`` int64."""
    offset = trajectory["rounds", "offset"]
    total = torch.cat([offset.new_zeros(1), trajectory["nodes", "accepted"].long().cumsum(0)])
    return total[offset[1:]] - total[offset[:-1]], offset.diff()


def acceptance_length(trajectory: TensorDictBase, speculative: Tensor | None = None) -> tuple[int, int]:
    """Tokens committed by speculative rounds (bonus token included) and the number of such rounds.

    Args:
        trajectory: of a request.
        speculative: ``[R]`` bool, the rounds for which drafts were asked for. None, where nobody noted them, takes
            those with a tree: the same, but of a drafter that may find nothing (n-grams).
    """
    if speculative is None:
        speculative = accepted_per_round(trajectory)[1] > 0
    anchor, length = trajectory["rounds", "anchor"], len(trajectory["sequence", "tokens"])
    committed = torch.cat([anchor[1:], anchor.new_tensor([length - 1])]) - anchor
    return int(committed[speculative].sum()), int(speculative.sum())


def check_features(batch: TensorDictBase, feature_layers: Sequence[int], hidden_size: int) -> None:
    """Raise ValueError where the recorded features have another width than those that a drafter reads.

    Args:
        batch: A trajectory, or several as :func:`pack` lays them.
        feature_layers: Layers that the drafter reads; where there are none, any features will do.
        hidden_size: Width of one layer's states.
    """
    width, count = batch["sequence", "features"].shape[-1], len(feature_layers)
    if count and width != count * hidden_size:
        recorded = f"{width // hidden_size} layers" if width % hidden_size == 0 else "another hidden size"
        raise ValueError(
            f"the recorded features are {width} wide, of {recorded}, and the drafter reads {count * hidden_size}, of "
            f"{count} layers {tuple(feature_layers)}: record the requests again with this drafter, or take the drafter "
            "that they were recorded with (drafter.name, drafter.path, drafter.feature_layers)"
        )


def pack(trajectories: Sequence[TensorDictBase]) -> TensorDict:
    """Lay trajectories end to end: a batch for objectives, with offsets and no padding.

    Every ``[S, ...]``, ``[R, ...]`` and ``[M, ...]`` entry is concatenated; ``("sequence", "offset")``,
    ``("rounds", "request_offset")`` and ``("nodes", "request_offset")``, each ``[n + 1]``, say where a request starts.
    0-d entries become ``[n]``. ``("rounds", "offset")`` is made relative to the batch. ``("nodes", "log_probs")`` is
    there if all of the trajectories have it.

    Args:
        trajectories: ``n`` packed trajectories, with the target's outputs in one form.

    Returns:
        A TensorDict of batch size [].

    Raises:
        ValueError: there is no trajectory, or the target's outputs come in different forms.
    """
    if not trajectories:
        raise ValueError("pack needs at least one trajectory")
    layout = _LAYOUT | _one_form(trajectories)
    if any(t.get(_LOG_PROBS, None) is None for t in trajectories):
        del layout[_LOG_PROBS]
    batch = TensorDict({}, batch_size=[])
    for key in layout:
        values = [t.get(key) for t in trajectories]
        if values[0].ndim == 0:
            batch[key] = torch.stack(values)
        elif key != ("rounds", "offset"):
            batch[key] = torch.cat(values)
    for part, entry in (("sequence", "tokens"), ("rounds", "anchor"), ("nodes", "tokens")):
        sizes = torch.tensor([0] + [len(t[part, entry]) for t in trajectories])
        batch[part, "offset" if part == "sequence" else "request_offset"] = sizes.cumsum(0)
    starts = batch["nodes", "request_offset"][:-1]
    ends = [t["rounds", "offset"][1:] + s for t, s in zip(trajectories, starts, strict=True)]
    batch["rounds", "offset"] = torch.cat([starts[:1], *ends])
    return batch


def _one_form(trajectories: Sequence[TensorDictBase]) -> _Layout:
    """The form of the target's outputs that all trajectories have."""
    ids = [t.get(("sequence", "topk_ids"), None) for t in trajectories]
    forms = ["'hidden'" if each is None else f"'topk_log_probs' of {each.shape[-1]} tokens" for each in ids]
    for index, form in enumerate(forms):
        if form != forms[0]:
            raise ValueError(
                f"a batch has the target's outputs in one form; trajectory 0 has {forms[0]}, trajectory {index} has "
                f"{form}. Let all engines of a learner record the same, or pack them apart"
            )
    return _HIDDEN if ids[0] is None else _TOPK


def pad_rows(values: Tensor, offset: Tensor) -> Tensor:
    """Packed rows ``[sum, ...]`` with offsets ``[n + 1]`` as ``[n, longest, ...]``, zeros behind each.

    Example:
        >>> pad_rows(torch.tensor([1, 2, 3]), torch.tensor([0, 1, 3]))
        tensor([[1, 0],
                [2, 3]])
    """
    sizes = offset.diff()
    out = values.new_zeros(len(sizes), int(sizes.max()), *values.shape[1:])
    out[torch.arange(out.shape[1], device=offset.device) < sizes[:, None]] = values
    return out
