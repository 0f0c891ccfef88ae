"""The packed trajectory of a request: its layout, its checks, and batches of it (docs/reference/trajectories.md).

Legend: ``S`` tokens of a request of which ``P`` are prompt, ``R`` rounds, ``M`` nodes of all rounds, ``F`` feature
size, ``H`` hidden size, ``K`` likeliest tokens, ``V`` vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from aurora_kernels.trees import depths
from aurora_rl.plausible import implausible
from aurora_rl.sampling_params import SamplingParams

RULE_CODES = ("greedy", "sample_and_match", "rejection", "rejection_without_replacement", "block")
"""Built-in verification rules, by their codes; see :func:`rule_code`."""
_OTHER_RULES = 2**56  # codes of other rules begin here
# How the drafter chose a tree's nodes: its likeliest, or draws, whose siblings are independent or all different.
DRAFT_MODES = ("topk", "sampled", "sampled_without_replacement")
# What stands for "hidden" where an engine gives the target's likeliest tokens and not its states.
TOPK_ENTRIES = ("topk_ids", "topk_log_probs", "tail_log_prob")


def rule_code(name: str) -> int:
    """Return a rule's number in trajectories: its place in :data:`RULE_CODES`, or a checksum of any other's name.

    Example:
        >>> rule_code("rejection"), rule_code("my_package.rules:Typical") == rule_code("my_package.rules:Typical")
        (2, True)
    """
    if name in RULE_CODES:
        return RULE_CODES.index(name)
    return _OTHER_RULES + int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])


def adapter_code(name: str) -> int:
    """Return what stands for a drafter's adapter in trajectories, a checksum of its name; 0 stands for none.

    Example:
        >>> adapter_code("acme") == adapter_code("acme"), adapter_code("acme") == adapter_code("globex")
        (True, False)
    """
    return 1 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])


def make_trajectory(
    *,
    request: int,
    tokens: Tensor,
    prompt_length: int,
    features: Tensor,
    target: Mapping[str, Tensor],
    anchors: Sequence[int],
    trees: Sequence[Mapping[str, Tensor]],
    policy_versions: Sequence[int],
    cache_versions: Sequence[int],
    sampling_params: SamplingParams,
    rule: str = "sample_and_match",
    draft_mode: str = "topk",
    adapter: int = 0,
) -> TensorDict:
    """Lay out a packed trajectory.

    Args:
        request: Number of the request, not negative.
        tokens: Tokens of prompt and completion, ``[S]`` int64.
        prompt_length: Number ``P`` of the prompt's tokens.
        features: Feature of each token but the last, ``[S - 1, F]``.
        target: The target's outputs from position ``P - 1`` to ``S - 2``: "hidden" ``[S - P, H]``, or
            :data:`TOPK_ENTRIES`.
        anchors: Position of each round's root, rising; ``R`` of them.
        trees: Nodes of each round, depth-first (``aurora_kernels.trees.reorder_depth_first``): "tokens", "parents"
            (−1 is the root), "accepted", the entries of ``target``, and "log_probs" if the drafter has scores. An
            entry that a round lacks is left out of all.
        policy_versions: Version of the weights that drafted each round.
        cache_versions: Oldest version with rows in the drafter's cache at each round.
        sampling_params: Parameters of the request. What ends it is not recorded: budget, stop strings, ``ignore_eos``.
        rule: Verification rule of sampled requests. A request at temperature 0 is recorded as "greedy".
        draft_mode: How the nodes were drawn, one of :data:`DRAFT_MODES`.
        adapter: Code of the adapter that drafted, see :func:`adapter_code`; 0, for none, is left out.

    Returns:
        A TensorDict of batch size [] on the CPU, in the layout that :func:`validate` checks.

    Example:
        >>> trajectory = make_trajectory(
        ...     request=0, tokens=torch.tensor([5, 6, 7]), prompt_length=2, features=torch.zeros(2, 16),
        ...     target={"hidden": torch.zeros(1, 16)}, anchors=[], trees=[], policy_versions=[], cache_versions=[],
        ...     sampling_params=SamplingParams(),
        ... )
        >>> validate(trajectory, vocab_size=32, feature_size=16, hidden_size=16)
    """
    none = torch.zeros(0, dtype=torch.int64)
    no_nodes = {"tokens": none, "parents": none, "accepted": none.bool(), "log_probs": none.float()}
    no_nodes |= {name: rows[:0] for name, rows in target.items()}
    keys = set(no_nodes).intersection(*trees)
    return TensorDict(
        {
            "request": torch.tensor(request),
            "sequence": {
                "tokens": tokens,
                "prompt_length": torch.tensor(prompt_length),
                "features": features,
                **({"adapter": torch.tensor(adapter)} if adapter else {}),
                **target,
            },
            "rounds": {
                "anchor": torch.tensor(anchors, dtype=torch.int64),
                "offset": torch.tensor([0, *(len(tree["tokens"]) for tree in trees)]).cumsum(0),
                "policy_version": torch.tensor(policy_versions, dtype=torch.int64),
                "cache_version": torch.tensor(cache_versions, dtype=torch.int64),
            },
            "nodes": {key: torch.cat([no_nodes[key], *(tree[key].cpu() for tree in trees)]) for key in keys},
            "sampling": {
                "temperature": torch.tensor(sampling_params.temperature, dtype=torch.float32),
                "top_k": torch.tensor(sampling_params.top_k),
                "top_p": torch.tensor(sampling_params.top_p, dtype=torch.float32),
                **({"min_p": torch.tensor(min_p, dtype=torch.float32)} if (min_p := sampling_params.min_p) else {}),
                "seed": torch.tensor(sampling_params.noise_seed),
                # At temperature 0 the built-in rules accept as the greedy one does; others are known by their own law.
                "rule": torch.tensor(
                    rule_code("greedy" if sampling_params.temperature == 0 and rule in RULE_CODES else rule)
                ),
                "draft_mode": torch.tensor(DRAFT_MODES.index(draft_mode)),
            },
        },
        batch_size=[],
    )


_Layout = dict[tuple[str, ...], tuple[str, str]]  # shape and dtype of every entry

_LAYOUT: _Layout = {
    ("request",): ("", "int64"),
    ("sequence", "tokens"): ("S", "int64"),
    ("sequence", "prompt_length"): ("", "int64"),
    ("sequence", "features"): ("S-1,F", "float"),
    ("sequence", "adapter"): ("", "int64"),
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
    ("sampling", "min_p"): ("", "float"),
    ("sampling", "seed"): ("", "int64"),
    ("sampling", "rule"): ("", "int64"),
    ("sampling", "draft_mode"): ("", "int64"),
}
_LOG_PROBS = ("nodes", "log_probs")  # may be absent: an engine that drafts by argmax has no scores
_ADAPTER = ("sequence", "adapter")  # is absent where the shared drafter drafted
_MIN_P = ("sampling", "min_p")  # is absent where it is 0: of earlier releases, too
_OPTIONAL = {_LOG_PROBS, _ADAPTER, _MIN_P}
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
    """Return the layout in the form of the trajectory; errors as of :func:`validate`."""
    keys = {k if isinstance(k, tuple) else (k,) for k in trajectory.keys(include_nested=True, leaves_only=True)}
    states, likeliest = sorted(keys & set(_HIDDEN)), sorted(keys & set(_TOPK))
    if states and likeliest:
        raise ValueError(
            f"a trajectory has the target's outputs in one form, 'hidden' or {TOPK_ENTRIES}, in 'sequence' and 'nodes' "
            f"alike; got {states} and {likeliest}"
        )
    layout = _LAYOUT | (_TOPK if likeliest else _HIDDEN)
    if keys - _OPTIONAL != set(layout) - _OPTIONAL:
        missing, extra = sorted(set(layout) - keys - _OPTIONAL), sorted(keys - set(layout))
        raise ValueError(f"a trajectory has exactly the entries of the layout; missing {missing}, unknown {extra}")
    return {key: what for key, what in layout.items() if key in keys}


def validate(trajectory: TensorDictBase, *, vocab_size: int, feature_size: int, hidden_size: int) -> None:
    """Check a trajectory that came over the network before anything reads it.

    Args:
        trajectory: Packed trajectory, in either form of the target's outputs, with ("nodes", "log_probs") or without.
        vocab_size: Vocabulary of the target; every token must lie in it.
        feature_size: Width ``F`` that the learner's drafter reads.
        hidden_size: Width ``H`` of the target.

    Raises:
        ValueError: Names the first entry that is missing, mixed, misshapen, of the wrong kind or out of range.
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
    for key, (shape, _) in layout.items():
        value, name = get(key), ".".join(key)
        expected = tuple(sizes[s] for s in shape.split(",")) if shape else ()
        if tuple(value.shape) != expected:
            raise ValueError(f"{name} must have shape [{shape}] = {expected}, got {tuple(value.shape)}")
        may_be_infinite = key == _LOG_PROBS or key[-1] == "tail_log_prob"
        if not may_be_infinite and (fault := implausible(value)) is not None:
            finite = bool(torch.isfinite(value).all())
            raise ValueError(f"{name} {fault}" if finite else f"{name} holds a value that is not finite")
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
    if not _are_depth_first(parents, parents + torch.repeat_interleave(offset[:-1], offset.diff())):
        raise ValueError(
            "nodes.parents must lay every tree depth-first; order its nodes by aurora_kernels.trees.reorder_depth_first"
        )
    if not 0 <= (rule := int(get(("sampling", "rule")))) < len(RULE_CODES) and rule < _OTHER_RULES:
        raise ValueError(f"sampling.rule must index {RULE_CODES} or be the code of another rule, got {rule}")
    if not 0 <= int(get(("sampling", "draft_mode"))) < len(DRAFT_MODES):
        raise ValueError(f"sampling.draft_mode must index {DRAFT_MODES}, got {int(get(('sampling', 'draft_mode')))}")


def _are_depth_first(parents: Tensor, above: Tensor) -> bool:
    """Return whether each node's parent is the last node before it that is one level higher, and no level is skipped.

    Parents ``[M]`` int64 are −1 at the first level of a tree; ``above`` are their places among all nodes.
    """
    depth, place = depths(torch.where(parents < 0, -1, above)[None])[0], torch.arange(len(parents))
    by_depth = (depth * len(parents) + place).sort().values
    last = by_depth[torch.searchsorted(by_depth, (depth - 1) * len(parents) + place) - 1] - (depth - 1) * len(parents)
    return bool(((parents < 0) | (last == above)).all() and (depth.diff() <= 1).all())


def _check_topk(part: str, ids: Tensor, log_probs: Tensor, tail: Tensor) -> None:
    """Check the rows of "sequence" or "nodes" as distributions: ``[X, K]``, ``[X, K]``, ``[X]``."""
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


def size_of(trajectory: TensorDictBase) -> int:
    """Return the bytes of a trajectory's tensors."""
    return sum(tensor.nbytes for tensor in trajectory.values(include_nested=True, leaves_only=True))


def accepted_per_round(trajectory: TensorDictBase) -> tuple[Tensor, Tensor]:
    """Return the accepted and the drafted nodes of each round, ``[R]`` and ``[R]`` int64."""
    offset = trajectory["rounds", "offset"]
    total = torch.cat([offset.new_zeros(1), trajectory["nodes", "accepted"].long().cumsum(0)])
    return total[offset[1:]] - total[offset[:-1]], offset.diff()


def acceptance_length(trajectory: TensorDictBase, speculative: Tensor | None = None) -> tuple[int, int]:
    """Return the tokens that speculative rounds committed, bonus tokens included, and the number of such rounds.

    ``speculative`` ``[R]`` bool are the rounds for which drafts were asked for. None takes those with a tree: the same,
    unless the drafter may find nothing (n-grams).
    """
    if speculative is None:
        speculative = accepted_per_round(trajectory)[1] > 0
    anchor, length = trajectory["rounds", "anchor"], len(trajectory["sequence", "tokens"])
    committed = torch.cat([anchor[1:], anchor.new_tensor([length - 1])]) - anchor
    return int(committed[speculative].sum()), int(speculative.sum())


def check_features(batch: TensorDictBase, feature_layers: Sequence[int], hidden_size: int) -> None:
    """Raise ValueError if the features of a trajectory or a packed batch have another width than a drafter reads.

    ``hidden_size`` is the width of one layer's states. A drafter without feature layers takes any features.
    """
    width, count = batch["sequence", "features"].shape[-1], len(feature_layers)
    if count and width != count * hidden_size:
        raise ValueError(
            f"the recorded features are {width} wide, and the drafter reads {count * hidden_size}, {count} layers "
            f"{tuple(feature_layers)} of {hidden_size}: they are of another target or drafter; record the requests "
            "again with these, or take those that they were recorded with (model, drafter.name, drafter.path, "
            "drafter.feature_layers)"
        )


def pack(trajectories: Sequence[TensorDictBase]) -> TensorDict:
    """Lay ``n`` trajectories end to end: a TensorDict of batch size [] for objectives, with offsets and no padding.

    Every ``[S, ...]``, ``[R, ...]`` and ``[M, ...]`` entry is concatenated. Three entries ``[n + 1]`` hold where each
    request starts: ``("sequence", "offset")``, ``("rounds", "request_offset")`` and ``("nodes", "request_offset")``.
    0-d entries become ``[n]``. ``("rounds", "offset")`` becomes relative to the batch. ``("nodes", "log_probs")`` is
    present if all of the trajectories have it, ``("sequence", "adapter")`` if one has it: it is 0 where it is absent.
    ``("sampling", "min_p")`` is always present, 0 where it is absent.

    Raises:
        ValueError: There is no trajectory, or the target's outputs come in different forms.
    """
    if not trajectories:
        raise ValueError("pack needs at least one trajectory")
    layout = _LAYOUT | _one_form(trajectories)
    if any(t.get(_LOG_PROBS, None) is None for t in trajectories):
        del layout[_LOG_PROBS]
    if all(t.get(_ADAPTER, None) is None for t in trajectories):
        del layout[_ADAPTER]
    batch, none = TensorDict({}, batch_size=[]), torch.zeros_like(trajectories[0]["request"])
    usual = {_ADAPTER: none, _MIN_P: none.float()}
    for key in layout:
        values = [t.get(key, usual[key]) if key in usual else t.get(key) for t in trajectories]
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


def unpack(batch: TensorDictBase) -> list[TensorDict]:
    """Return the trajectories of a batch of :func:`pack`, as views of it.

    What the collector noted on a trajectory is not in a batch, and so in none of them.

    Example:
        >>> from aurora_rl.testing import tiny_batch
        >>> batch = tiny_batch()[2]
        >>> again = pack(unpack(batch))
        >>> all(bool((again[key] == value).all()) for key, value in batch.items(True, True))
        True
    """
    layout = _LAYOUT | (_HIDDEN if batch.get(("sequence", "topk_ids"), None) is None else _TOPK)
    for optional in _OPTIONAL:
        if batch.get(optional, None) is None:
            del layout[optional]
    sequence, prompt = batch["sequence", "offset"], batch["sequence", "prompt_length"]
    rounds, nodes = batch["rounds", "request_offset"], batch["nodes", "request_offset"]
    ends = {
        "S": sequence,
        "S-1": sequence - torch.arange(len(sequence)),
        "S-P": sequence - torch.cat([prompt.new_zeros(1), prompt.cumsum(0)]),
        "R": rounds,
        "M": nodes,
    }
    places = {name: offset.tolist() for name, offset in ends.items()}
    trajectories = []
    for index in range(len(prompt)):
        trajectory = TensorDict({}, batch_size=[])
        for key, (shape, _) in layout.items():
            rows = shape.partition(",")[0]
            if not rows:
                trajectory[key] = batch[key][index]
            elif rows == "R+1":
                first, last = places["R"][index : index + 2]
                trajectory[key] = batch[key][first : last + 1] - batch[key][first]
            else:
                first, last = places[rows][index : index + 2]
                trajectory[key] = batch[key][first:last]
        trajectories.append(trajectory)
    return trajectories


def _one_form(trajectories: Sequence[TensorDictBase]) -> _Layout:
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
    """Return packed rows ``[sum, ...]`` with offsets ``[n + 1]`` as ``[n, longest, ...]``, padded with zeros.

    Example:
        >>> pad_rows(torch.tensor([1, 2, 3]), torch.tensor([0, 1, 3]))
        tensor([[1, 0],
                [2, 3]])
    """
    sizes = offset.diff()
    out = values.new_zeros(len(sizes), int(sizes.max()), *values.shape[1:])
    out[torch.arange(out.shape[1], device=offset.device) < sizes[:, None]] = values
    return out
