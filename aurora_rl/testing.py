"""Tiny models and conformance checks, for this project's tests and for third parties' parts."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from aurora_rl.envs import Completion, Engine, Request, SamplingParams, SpecDecodeEnv, TransformersEngine
from aurora_rl.policies import Drafter, DrafterPolicy, Proposal, TargetParts, TreeShape
from aurora_rl.trajectories import pack
from aurora_rl.trees import depths, valid_nodes

# Nats between what serving recorded and what training computes: trajectories hold log-probabilities in float32.
_RECORDED = {torch.float64: 1e-5, torch.float32: 5e-4}
# Nats between two ways of computing the same log-probability.
_COMPUTED = {torch.float64: 1e-9, torch.float32: 5e-4}
# Relative to the largest value. Hugging Face norms compute in float32 whatever the dtype, so float64 may differ by
# one that was rounded the other way.
_ENGINE = {torch.float64: 1e-6, torch.float32: 1e-4}


def tiny_target(
    architecture: str = "llama",
    *,
    vocab_size: int = 32,
    num_layers: int = 3,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> PreTrainedModel:
    """A random causal LM of hidden size 16, for tests.

    Args:
        architecture: "llama" or "qwen3".
        vocab_size: its vocabulary.
        num_layers: its decoder layers.
        dtype: its dtype.
        seed: of its weights.

    Example:
        >>> tiny_target("qwen3").dtype
        torch.float64
    """
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[architecture]
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=512,
        # Wide weights: a random model with small ones has nearly flat logits, and everything would agree by chance.
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
    return _cast(model, dtype).eval().requires_grad_(False)


def tiny_trajectory(
    drafter: Drafter,
    *,
    architecture: str = "llama",
    prompt_length: int = 5,
    max_new_tokens: int = 12,
    shape: TreeShape | None = None,
    sampling: SamplingParams | None = None,
    request: int = 0,
) -> TensorDict:
    """A packed trajectory, made by serving a tiny target with a drafter; the same at every call.

    Args:
        drafter: made for :func:`tiny_target` (32 tokens, hidden size 16); served as a copy, in its own dtype.
        architecture: of the target.
        prompt_length: ``P``; the prompt follows from ``request``.
        max_new_tokens: length of the completion.
        shape: the trees; None takes a chain of 3.
        sampling: of the request; None samples at temperature 1.
        request: the request's number, at least 0.

    Example:
        >>> from aurora_rl.policies import MedusaDrafter
        >>> drafter = MedusaDrafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16))
        >>> tiny_trajectory(drafter)["spine", "tokens"].shape
        torch.Size([17])
    """
    prompt = torch.randint(32, (prompt_length,), generator=torch.Generator().manual_seed(request))
    return serve(
        drafter,
        tiny_target(architecture, dtype=_dtype(drafter)),
        [prompt],
        shape=shape or TreeShape(3),
        max_new_tokens=max_new_tokens,
        sampling=sampling or SamplingParams(temperature=1.0, seed=request),
        first_request=request,
    )[0]


def serve(
    drafter: Drafter,
    target: PreTrainedModel,
    prompts: Sequence[Tensor],
    *,
    shape: TreeShape,
    max_new_tokens: int = 12,
    num_slots: int = 1,
    sampling: SamplingParams | None = None,
    first_request: int = 0,
) -> list[TensorDict]:
    """Serve prompts speculatively, all rounds drafted, and return their trajectories.

    Args:
        drafter: what drafts; a copy serves, so its cache and modules stay as they are.
        target: the target; a copy serves.
        prompts: each ``[P]`` int64.
        shape: the trees.
        max_new_tokens: length of every completion; nothing else ends one.
        num_slots: slots of the engine.
        sampling: of every request, its seed raised by the number of the prompt; None decodes greedily.
        first_request: number of the first request.

    Returns:
        One packed trajectory for each prompt, in their order.
    """
    sampling, drafter = sampling or SamplingParams(), copy.deepcopy(drafter)
    engine = TransformersEngine(
        copy.deepcopy(target),
        num_slots=num_slots,
        max_length=max(len(p) for p in prompts) + max_new_tokens,
        feature_layers=drafter.feature_layers,
    )
    requests = iter(
        Request(first_request + i, prompt, max_new_tokens, replace(sampling, seed=sampling.seed + i))
        for i, prompt in enumerate(prompts)
    )
    done: list[Completion] = []
    env = SpecDecodeEnv(
        engine, lambda: next(requests, None), num_nodes=max(shape.most_nodes, 1), on_completion=done.append
    )
    policy = DrafterPolicy(drafter, engine.store, num_nodes=env.num_nodes, shape=shape)
    td = env.reset()
    while env.num_active:
        _, td = env.step_and_maybe_reset(policy(td))
    done.sort(key=lambda completion: completion.request.id)
    return [completion.trajectory for completion in done if completion.trajectory is not None]


# ---- drafters -------------------------------------------------------------------------------------------------------


def check_drafter(
    drafter: Drafter, target: PreTrainedModel, *, without_gradient: Collection[str] = (), seed: int = 0
) -> None:
    """Check that a drafter keeps the promises of :class:`~aurora_rl.policies.Drafter`.

    The target is served with it on several slots, from prompts of unequal length, with chains and with trees. All of
    this happens to copies, whose weights are moved a little at random, since parts that start at zero do nothing yet.

    Args:
        drafter: in float64 or float32; float64 tells a mistake from rounding.
        target: what the drafter was made for; its weights are used in the drafter's dtype.
        without_gradient: published float tensors that :meth:`~aurora_rl.policies.Drafter.unroll` need not reach.
        seed: of the weights' noise, the prompts and the completions.

    Raises:
        AssertionError: names the promise that is broken.
        ValueError: the drafter has another dtype.

    Example:
        >>> from aurora_rl.policies import MedusaDrafter
        >>> target = tiny_target()
        >>> drafter = MedusaDrafter.from_target(TargetParts.of(target), draft_vocab=torch.arange(20))
        >>> check_drafter(drafter.double(), target)
    """
    dtype = _dtype(drafter)
    if dtype not in _COMPUTED:
        raise ValueError(f"check_drafter needs a drafter in float64 or float32, got {dtype}")
    generator = torch.Generator().manual_seed(seed)
    drafter = copy.deepcopy(drafter)
    drafter.install(_moved(drafter.published(), generator))
    target = _cast(copy.deepcopy(target), dtype)
    vocab_size = TargetParts.of(target).head.shape[0]
    prompts = [torch.randint(vocab_size, (n,), generator=generator) for n in (1, 7, 2, 4)]
    shapes = (TreeShape(1), TreeShape(4), TreeShape(4, 2), TreeShape(3, 3, 9))

    def served(shape: TreeShape) -> list[TensorDict]:
        sampling = SamplingParams(temperature=1.0, seed=seed)
        return serve(drafter, target, prompts, shape=shape, max_new_tokens=8, num_slots=3, sampling=sampling)

    plain = served(TreeShape(0))
    for shape in shapes:
        _check_proposals(drafter, plain, shape, vocab_size)
    for shape in shapes:
        trajectories = served(shape)
        _check_recorded(drafter, trajectories, shape)
    _check_unroll(drafter, trajectories)
    _check_packing(drafter, trajectories)
    _check_cache(drafter, trajectories)
    _check_gradients(drafter, trajectories, without_gradient)
    _check_weights(drafter, trajectories, generator)


def _check_proposals(drafter: Drafter, trajectories: list[TensorDict], shape: TreeShape, vocab_size: int) -> None:
    slots = _filled(drafter, trajectories)
    tokens, parents, log_probs = drafter.propose(slots, shape)
    what = f"propose with {shape}"
    _require(tokens.shape == parents.shape == log_probs.shape, f"{what}: tokens, parents and log_probs differ in shape")
    _require(
        tokens.shape[0] == len(slots) and 1 <= tokens.shape[1] <= shape.budget,
        f"{what}: expected [{len(slots)}, 1..{shape.budget}] nodes, got {tuple(tokens.shape)}",
    )
    _require(tokens.dtype == parents.dtype == torch.int64, f"{what}: tokens and parents are not int64")
    _require(log_probs.dtype == torch.float32, f"{what}: log_probs are {log_probs.dtype}, not float32")
    earlier = (parents >= -1) & (parents < torch.arange(parents.shape[1]))
    _require(bool(earlier.all()), f"{what}: a node's parent is neither an earlier node nor -1")
    _require(int(depths(parents).max()) <= shape.depth, f"{what}: a path is deeper than {shape.depth}")
    _require(bool(torch.isin(tokens, drafter.draft_vocab).all()), f"{what}: a token is outside the draft vocabulary")
    legal = valid_nodes(tokens, parents, torch.ones_like(tokens, dtype=torch.bool), vocab_size)
    _require(bool(legal.all()), f"{what}: two siblings carry the same token")
    _require(bool((log_probs <= 0).all()), f"{what}: a log-probability is above 0 or not a number")
    empty = drafter.propose(slots, TreeShape(0)).tokens
    _require(empty.shape == (len(slots), 0), f"propose at depth 0 gave {tuple(empty.shape)} and not no nodes")


def _check_recorded(drafter: Drafter, trajectories: list[TensorDict], shape: TreeShape) -> None:
    batch = pack(trajectories)
    recorded, scored = batch["nodes", "log_probs"], drafter.score(batch)
    _require(scored.shape == recorded.shape, f"score gave {tuple(scored.shape)} for {tuple(recorded.shape)} nodes")
    _require(scored.requires_grad, "score is not differentiable in the drafter's parameters")
    gap = float((scored.detach() - recorded).abs().max())
    _require(
        gap <= _RECORDED[_dtype(drafter)],
        f"score differs by {gap:.2g} nats from what serving recorded with {shape}; are features paired with tokens as "
        "in serving (feature t with token t + 1)?",
    )
    foreign = _outside(drafter.draft_vocab)
    if foreign is not None:
        batch["nodes", "tokens"] = torch.full_like(batch["nodes", "tokens"], foreign)
        _require(
            bool((drafter.score(batch) == -torch.inf).all()),
            "score of a token outside the draft vocabulary is not -inf",
        )


def _check_unroll(drafter: Drafter, trajectories: list[TensorDict]) -> None:
    """Step ``j`` of unroll against score, asked for chains of the true tokens from every anchor."""
    steps = 4
    batch = pack(trajectories)
    with torch.no_grad():
        logits, valid = drafter.unroll(batch, steps)
    _require(1 <= len(logits) <= steps, f"unroll of {steps} steps gave {len(logits)}")
    rows = batch["spine", "hidden"].shape[0]
    expected_shape = (rows, len(drafter.draft_vocab))
    _require(
        all(step.shape == expected_shape for step in logits),
        f"unroll gave logits {[tuple(step.shape) for step in logits]}, expected {expected_shape} at every step",
    )
    _require(valid.shape == (len(logits), rows), f"unroll gave valid {tuple(valid.shape)}")
    scored = drafter.score(pack([_with_true_chains(t, len(logits)) for t in trajectories])).detach()
    node, row = 0, 0
    for trajectory in trajectories:
        tokens, prompt = trajectory["spine", "tokens"], int(trajectory["spine", "prompt_length"])
        for anchor in range(prompt - 1, len(tokens) - 1):
            for step in range(min(len(logits), len(tokens) - 1 - anchor)):
                at = row + anchor + 1 + step - prompt
                _require(
                    bool(valid[step, at]) == (anchor > 0),
                    f"unroll: step {step} from the anchor at position {anchor} of a prompt of {prompt} tokens must be "
                    f"{'valid' if anchor else 'invalid: nothing is before it'}",
                )
                choice = (drafter.draft_vocab == tokens[anchor + 1 + step]).nonzero().flatten()
                if anchor and len(choice):
                    gap = float((logits[step][at].log_softmax(-1)[choice[0]] - scored[node]).abs())
                    _require(
                        gap <= _COMPUTED[_dtype(drafter)],
                        f"unroll at step {step} from the anchor at position {anchor} differs by {gap:.2g} nats from "
                        "the score of a chain of the true tokens",
                    )
                node += 1
        completion = len(tokens) - prompt
        for step in range(min(len(logits), completion)):
            early = valid[step, row : row + step]
            _require(
                not bool(early.any()), f"unroll: step {step} of the first {step} tokens has no anchor, yet is valid"
            )
        row += completion


def _check_packing(drafter: Drafter, trajectories: list[TensorDict]) -> None:
    """Training must not depend on what else is in the batch."""
    atol = _COMPUTED[_dtype(drafter)]
    together, alone = drafter.score(pack(trajectories)), [drafter.score(pack([t])) for t in trajectories]
    _require(_close(together, torch.cat(alone), atol), "score depends on the other trajectories of the batch")
    all_logits, valid = drafter.unroll(pack(trajectories), 3)
    singles = [drafter.unroll(pack([t]), 3) for t in trajectories]
    _require(
        torch.equal(valid, torch.cat([single.valid for single in singles], dim=1)),
        "unroll's valid depends on the other trajectories of the batch",
    )
    for step, logits in enumerate(all_logits):
        one_by_one = torch.cat([single.logits[step] for single in singles])
        _require(
            _close(logits[valid[step]], one_by_one[valid[step]], atol),
            f"unroll at step {step} depends on the other trajectories of the batch",
        )


def _check_cache(drafter: Drafter, trajectories: list[TensorDict]) -> None:
    """Serving must not depend on how a slot was filled nor on the other slots."""
    shape, atol = TreeShape(3, 2), _RECORDED[_dtype(drafter)]
    slots = _filled(drafter, trajectories)
    lengths = torch.tensor([len(t["spine", "tokens"]) - 1 for t in trajectories])
    _require(
        torch.equal(drafter.cached, lengths), f"cached is {drafter.cached.tolist()} after {lengths.tolist()} pairs"
    )
    expected = drafter.propose(slots, shape)

    def same(slots: Tensor, why: str) -> None:
        got = drafter.propose(slots, shape)
        wanted = Proposal(*(part[slots] for part in expected))
        equal = torch.equal(got.tokens, wanted.tokens) and torch.equal(got.parents, wanted.parents)
        _require(equal and _close(got.log_probs, wanted.log_probs, atol), f"proposals change {why}")

    same(slots, "when asked for again")
    same(slots.flip(0), "with the order of the slots")
    for slot in slots:
        same(slot[None], "when a slot is asked alone")

    drafter.forget(slots[1:2])
    _require(int(drafter.cached[1]) == 0, "forget leaves pairs in `cached`")
    same(slots[:1], "when another slot is forgotten")
    for start in range(0, int(lengths[1]), 3):
        end = lengths[1:2].clamp(max=start + 3)
        _extend(drafter, trajectories[1:2], slots[1:2], torch.tensor([start]), end)
        drafter.propose(slots[1:2], shape)  # drafting between two rounds must leave no trace
    same(slots, "when a slot was forgotten and caught up in pieces")

    # Pieces of unequal length, one call for all slots: the shorter ones are padded.
    drafter.allocate(len(slots) + 2, int(lengths.max()) + 1)
    _require(not bool(drafter.cached.any()), "allocate leaves pairs in `cached`")
    middle = lengths - 1 - torch.arange(len(slots)) % 3
    _extend(drafter, trajectories, slots, torch.zeros_like(lengths), middle)
    _extend(drafter, trajectories, slots, middle, lengths)
    same(slots, "when slots of unequal length are extended in one call, or beside empty slots")


def _check_gradients(drafter: Drafter, trajectories: list[TensorDict], without: Collection[str]) -> None:
    learner = copy.deepcopy(drafter).requires_grad_(True)
    logits, valid = learner.unroll(pack(trajectories), 4)
    torch.stack([(step[ok] ** 2).sum() for step, ok in zip(logits, valid, strict=True)]).sum().backward()
    gradients = {parameter.data_ptr(): parameter.grad for parameter in learner.parameters()}
    for name, tensor in learner.published().items():
        if not tensor.is_floating_point() or name in without:
            continue
        _require(tensor.data_ptr() in gradients, f"the published tensor {name!r} is not one of the parameters")
        gradient = gradients[tensor.data_ptr()]
        _require(
            gradient is not None and bool((gradient != 0).any()) and bool(torch.isfinite(gradient).all()),
            f"unroll gives the published tensor {name!r} no gradient, or one that is not finite",
        )


def _check_weights(drafter: Drafter, trajectories: list[TensorDict], generator: torch.Generator) -> None:
    batch = pack(trajectories)
    before = {name: tensor.clone() for name, tensor in drafter.published().items()}
    scored = drafter.score(batch).detach()

    def unchanged(why: str) -> None:
        after = drafter.published()
        _require(list(after) == list(before), f"published lists other tensors {why}")
        for name, tensor in before.items():
            _require(torch.equal(after[name], tensor), f"the published tensor {name!r} changes {why}")
        _require(torch.equal(drafter.score(batch).detach(), scored), f"score changes {why}")

    drafter.install(before)
    unchanged("when published tensors are installed again")

    moved = _moved(before, generator)
    last = list(before)[-1]
    for broken, name in (
        *(({n: t for n, t in moved.items() if n != name}, name) for name in before),
        *(({**moved, name: tensor[:-1]}, name) for name, tensor in before.items()),
        ({**moved, "no.such.tensor": moved[last]}, "no.such.tensor"),
    ):
        try:
            drafter.install(broken)
        except ValueError as error:
            _require(repr(name) in str(error), f"install refuses the tensor {name!r} without naming it: {error}")
        else:
            raise AssertionError(f"install takes weights whose tensor {name!r} is missing, misshapen or unknown")
        unchanged(f"when weights are refused for {name!r}")

    drafter.install({name: t.double() if t.is_floating_point() else t for name, t in moved.items()})
    for name, tensor in drafter.published().items():
        _require(tensor.dtype == before[name].dtype, f"install changes the dtype of {name!r} to {tensor.dtype}")
        _require(torch.equal(tensor, moved[name]), f"install does not replace {name!r}")
    _require(not torch.equal(drafter.score(batch).detach(), scored), "score does not change with the weights")
    drafter.install(before)
    unchanged("when other weights were installed in between")


def _filled(drafter: Drafter, trajectories: Sequence[TensorDictBase]) -> Tensor:
    """Give each trajectory a slot and put all of its pairs there, slot by slot; returns the slots."""
    lengths = torch.tensor([len(t["spine", "tokens"]) - 1 for t in trajectories])
    slots = torch.arange(len(trajectories))
    drafter.allocate(len(slots), int(lengths.max()) + 1)
    for i in slots.tolist():
        _extend(
            drafter, trajectories[i : i + 1], slots[i : i + 1], torch.zeros(1, dtype=torch.int64), lengths[i : i + 1]
        )
    return slots


def _extend(
    drafter: Drafter, trajectories: Sequence[TensorDictBase], slots: Tensor, start: Tensor, end: Tensor
) -> None:
    """Append pairs ``start`` to ``end - 1`` of each trajectory to its slot; there is always a column of padding."""
    count = end - start
    width = int(count.max()) + 1
    first = trajectories[0]["spine", "features"]
    tokens = torch.zeros(len(slots), width, dtype=torch.int64)
    features = first.new_full((len(slots), width, first.shape[1]), 7.0)
    for i, trajectory in enumerate(trajectories):
        here = slice(int(start[i]), int(end[i]))
        tokens[i, : int(count[i])] = trajectory["spine", "tokens"][1:][here]
        features[i, : int(count[i])] = trajectory["spine", "features"][here]
    drafter.extend(slots, tokens, features, count)


def _with_true_chains(trajectory: TensorDictBase, steps: int) -> TensorDictBase:
    """The trajectory with other rounds: from every anchor a chain of up to ``steps`` tokens of the text itself."""
    tokens, prompt = trajectory["spine", "tokens"], int(trajectory["spine", "prompt_length"])
    anchors = range(prompt - 1, len(tokens) - 1)
    chains = [tokens[a + 1 : a + 1 + steps] for a in anchors]
    out = trajectory.clone()
    out["rounds", "anchor"] = torch.tensor(anchors)
    out["rounds", "offset"] = torch.tensor([0] + [len(c) for c in chains]).cumsum(0)
    for key in ("policy_version", "cache_version"):
        out["rounds", key] = torch.zeros(len(anchors), dtype=torch.int64)
    out["nodes", "tokens"] = torch.cat(chains)
    out["nodes", "parents"] = torch.cat([torch.arange(len(c)) - 1 for c in chains])
    nodes = len(out["nodes", "tokens"])
    out["nodes", "log_probs"] = torch.zeros(nodes)
    out["nodes", "accepted"] = torch.ones(nodes, dtype=torch.bool)
    out["nodes", "hidden"] = trajectory["nodes", "hidden"].new_zeros(nodes, trajectory["spine", "hidden"].shape[1])
    return out


def _moved(weights: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Copies of the weights with noise on those that are floats."""
    return {
        name: t + 0.1 * torch.randn(t.shape, generator=generator).to(t) if t.is_floating_point() else t.clone()
        for name, t in weights.items()
    }


def _outside(draft_vocab: Tensor) -> int | None:
    """Some token id that is not in the draft vocabulary and smaller than its largest, if there is one."""
    known = set(draft_vocab.tolist())
    return next((i for i in range(max(known)) if i not in known), None)


# ---- engines --------------------------------------------------------------------------------------------------------


def check_engine(
    engine: Engine, reference: PreTrainedModel, *, feature_layers: Sequence[int], rounds: int = 4, seed: int = 0
) -> None:
    """Check an engine against its model run over each path of each tree by itself, without a cache.

    Random trees are verified on slots of unequal length, some nodes invalid; random paths are committed, some cut
    short; slots are left out of rounds, released and taken again.

    Args:
        engine: with all slots free, in float64 or float32, and room for about 40 tokens; its slots are free afterwards.
        reference: the engine's model as Hugging Face runs it, a copy of its own.
        feature_layers: what the engine was told to capture.
        rounds: rounds of each of the two turns.
        seed: of prompts, trees and paths.

    Raises:
        AssertionError: names what differs, and by how much.

    Example:
        >>> engine = TransformersEngine(tiny_target(), num_slots=2, max_length=64, feature_layers=(0, 3))
        >>> check_engine(engine, tiny_target(), feature_layers=(0, 3), rounds=2)
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    texts: list[list[int]] = [[] for _ in range(engine.num_slots)]
    prompts: list[int] = [0] * engine.num_slots
    for _ in range(2):  # in the second turn slots are used again, beside others that go on
        free = [slot for slot, text in enumerate(texts) if not text]
        for slot in free:
            prompts[slot] = 1 + (3 * slot + draw(3)) % 9
            texts[slot] = torch.randint(engine.vocab_size, (prompts[slot],), generator=generator).tolist()
        engine.prefill(free, [torch.tensor(texts[slot]) for slot in free])
        for _ in range(rounds):
            slots = [slot for slot in range(engine.num_slots) if draw(4)] or [0]
            if draw(2):  # a round that is verified and never committed must leave no trace
                engine.verify(torch.tensor(slots), *_random_trees(len(slots), draw(5), engine.vocab_size, generator))
            _check_round(engine, reference, tuple(feature_layers), slots, texts, draw(7), generator)
            _check_store(engine, reference, tuple(feature_layers), texts, prompts)
        for slot in range(0, engine.num_slots, 2):
            engine.release(slot)
            texts[slot] = []
            _require(int(engine.store.lengths[slot]) == 0, f"slot {slot} is not free after release")
    for slot in range(1, engine.num_slots, 2):
        engine.release(slot)


def _check_round(
    engine: Engine,
    reference: PreTrainedModel,
    layers: tuple[int, ...],
    slots: list[int],
    texts: list[list[int]],
    num_nodes: int,
    generator: torch.Generator,
) -> None:
    tokens, parents, valid = _random_trees(len(slots), num_nodes, engine.vocab_size, generator)
    hidden = engine.verify(torch.tensor(slots), tokens, parents, valid)
    size = engine.store.hidden.shape[-1]
    _require(hidden.shape == (len(slots), num_nodes + 1, size), f"verify gave {tuple(hidden.shape)}")
    logits = engine.logits(hidden)
    paths = torch.full((len(slots), num_nodes), -1)
    committed = torch.zeros(len(slots), num_nodes + 1, dtype=torch.int64)
    num_new = torch.zeros(len(slots), dtype=torch.int64)
    for row, slot in enumerate(slots):
        _require(int(engine.store.lengths[slot]) == len(texts[slot]), f"verify changed the length of slot {slot}")
        nodes = [-1, *valid[row].nonzero().flatten().tolist()]
        for node in nodes:
            path = _path(parents[row].tolist(), node)
            text = texts[slot] + tokens[row, path].tolist()
            expected, _, expected_logits = _reference_pass(reference, text, layers)
            where = f"slot {slot} at {len(texts[slot])} tokens, path {path} of parents {parents[row].tolist()}"
            _same_values(hidden[row, node + 1], expected[-1], f"hidden, {where}")
            _same_values(logits[row, node + 1], expected_logits[-1], f"logits, {where}")
        path = _path(parents[row].tolist(), nodes[int(torch.randint(len(nodes), (), generator=generator))])
        bonus = int(torch.randint(engine.vocab_size, (), generator=generator))
        delivered = [*tokens[row, path].tolist(), bonus]
        # A stop token or the budget may end the delivery anywhere.
        keep = 1 + int(torch.randint(len(delivered), (), generator=generator))
        num_new[row] = keep
        committed[row, :keep] = torch.tensor(delivered[:keep])
        kept = path[:keep]
        paths[row, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
        texts[slot] += delivered[:keep]
    features = engine.commit(torch.tensor(slots), paths, committed, num_new)
    for row, slot in enumerate(slots):
        count = int(num_new[row])
        _, expected, _ = _reference_pass(reference, texts[slot], layers)
        _same_values(features[row, :count], expected[-1 - count : -1], f"features that commit gave for slot {slot}")


def _check_store(
    engine: Engine, reference: PreTrainedModel, layers: tuple[int, ...], texts: list[list[int]], prompts: list[int]
) -> None:
    store = engine.store
    for slot, text in enumerate(texts):
        length = len(text)
        _require(int(store.lengths[slot]) == length, f"slot {slot} has length {int(store.lengths[slot])}, not {length}")
        _require(int(store.prompt_lengths[slot]) == prompts[slot], f"slot {slot} forgot the length of its prompt")
        _require(store.tokens[slot, :length].tolist() == text, f"the store has other tokens in slot {slot}")
        hidden, features, _ = _reference_pass(reference, text, layers)
        _same_values(store.features[slot, : length - 1], features[:-1], f"features in the store, slot {slot}")
        first = prompts[slot] - 1
        _same_values(store.hidden[slot, first : length - 1], hidden[first:-1], f"hidden in the store, slot {slot}")


@torch.inference_mode()
def _reference_pass(model: PreTrainedModel, text: list[int], layers: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden ``[S, H]``, features ``[S, F]`` and logits ``[S, V]`` of a text, from one pass without a cache."""
    out = model(input_ids=torch.tensor([text]), output_hidden_states=True, use_cache=False)
    return out.hidden_states[-1][0], torch.cat([out.hidden_states[layer][0] for layer in layers], dim=-1), out.logits[0]


def _random_trees(
    count: int, num_nodes: int, vocab_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Trees with some nodes masked out, a few with parents or tokens that make no sense."""
    tokens = torch.randint(-1, vocab_size + 1, (count, num_nodes), generator=generator)
    parents = (
        torch.stack([torch.randint(-1, max(i, 0) + 1, (count,), generator=generator) for i in range(num_nodes)], dim=1)
        if num_nodes
        else torch.zeros(count, 0, dtype=torch.int64)
    )
    mask = torch.rand(count, num_nodes, generator=generator) < 0.9
    return tokens, parents, valid_nodes(tokens, parents, mask, vocab_size)


def _path(parents: list[int], node: int) -> list[int]:
    """The nodes from the root's child down to ``node``; none for the root."""
    path: list[int] = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


# ---- small helpers --------------------------------------------------------------------------------------------------


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    nn.Module.to(model, dtype=dtype)  # transformers wraps `to` in a way that type checkers cannot read
    return model


def _dtype(drafter: Drafter) -> torch.dtype:
    return next(drafter.parameters()).dtype


def _require(condition: bool, message: str) -> None:
    """An assertion that ``python -O`` keeps."""
    if not condition:
        raise AssertionError(message)


def _close(a: Tensor, b: Tensor, atol: float) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=atol)


def _same_values(got: Tensor, expected: Tensor, what: str) -> None:
    _require(
        got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, the reference has {tuple(expected.shape)}"
    )
    if not got.numel():
        return
    gap = float((got - expected).abs().max())
    limit = _ENGINE[got.dtype] * max(1.0, float(expected.abs().max()))
    _require(gap <= limit, f"{what}: differs by {gap:.2g} from the reference, {limit:.2g} is rounding")
