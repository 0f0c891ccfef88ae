"""CPU time of parts of the kernels: loss by chunks, attention in training, batch invariance, and draws by chunks.

All times are CPU time of this process, so that other work on the machine changes them little. Each gradient step runs
in a process of its own, for its peak memory. Ways that are compared must agree.

    python benchmarks/kernel_parts.py
"""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from common import arguments, parse, write_result
from scoring import CONFIG, tree
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from typing_extensions import override

from aurora_kernels import gumbel_argmax, tree_training_attention
from aurora_kernels.noise import uniform
from aurora_kernels.trees import depths
from aurora_rl import Request, SamplingParams, TargetParts, TransformersEngine, TreeShape
from aurora_rl.models.loading import load_target
from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives import Windows, forward_kl, get_objective, overlap, register_objective
from aurora_rl.policies import Eagle3Drafter, HeadLogits, Unroll
from aurora_rl.policies.decoder import SpeculativeDecoder
from aurora_rl.trajectories import make_trajectory, pack
from aurora_rl.tree_index import TreeIndex, true_chains
from kernels import CLEAR, forget_peak, memory


def cpu_seconds(run: Callable[..., Any], *arguments: Any) -> float:
    began = time.process_time()
    run(*arguments)
    return time.process_time() - began


# ---- a gradient step of a draft head -----------------------------------------------------------------------------

M_MMAP_THRESHOLD = -3  # mallopt's number of it
DRAFT_VOCAB, POSITIONS, ROUNDS, NODES, STEPS = 8192, 480, 219, 20, 5  # 219 trees of 20 nodes: 4,380
OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "expected_length, rejection": ("expected_length", {"rule": "rejection", "steps": STEPS}),
    "the same, in trees": ("expected_length", {"rule": "rejection", "contexts": "trees"}),
    "discard": ("discard", {}),
    "discard, a head for each depth": ("discard", {}),
    "imitation, target: served": ("imitation", {"target": "served", "steps": STEPS}),
    "imitation, target: served, top-p 0.9": ("imitation", {"target": "served", "steps": STEPS}),
    "imitation, weighting: expected_length": ("imitation", {"weighting": "expected_length", "steps": STEPS}),
    "a function": ("kernel_parts_reach_kl", {"steps": STEPS}),
    "acceptance_reward, rejection": ("acceptance_reward", {}),
    "acceptance_reward, sample_and_match": ("acceptance_reward", {}),
    "acceptance_reward, sample_and_match, a head for each depth": ("acceptance_reward", {}),
}


@register_objective("kernel_parts_reach_kl")
def reach_kl(log_p: Tensor, log_q: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Forward KL of every draft, weighted by the chance that all before it are accepted."""
    accepted = torch.where(windows.valid, overlap(log_p, log_q), 0.0).detach()
    reached = torch.cat([torch.ones_like(accepted[:1]), accepted[:-1]]).cumprod(0)
    return reached * forward_kl(log_p, log_q), windows.valid


class HeadAlone(Eagle3Drafter):
    """An EAGLE-3 drafter's head on random states that learn: five an unrolled position, and one a context of a tree.

    Attributes:
        plain: Whether the logits of all rows are made, as a drafter does whose head is no matrix.
        heads: One head, or one for each depth of a tree.
    """

    plain: bool
    states: Tensor
    heads: nn.ParameterList

    def _logits(self, states: Tensor, head_of: Tensor | None = None) -> Tensor:
        logits = HeadLogits(states, list(self.heads), head_of)
        return logits.product if self.plain else logits

    @override
    def unroll(self, batch: TensorDictBase, steps: int) -> Unroll:
        _, _, valid = true_chains(batch, steps)
        states = list(self.states[: steps * POSITIONS].split(POSITIONS))
        return Unroll([self._logits(each) for each in states], valid, states)

    @override
    def context_logits(self, batch: TensorDictBase, trees: TreeIndex, wanted: Tensor) -> Tensor:
        head_of = trees.depth[wanted].clamp(max=len(self.heads) - 1) if len(self.heads) > 1 else None
        return self._logits(self.states[: len(wanted)][wanted], head_of)


def recording(rule: str, top_p: float) -> TensorDict:
    """Make a request of random tokens at temperature 0.7 with a tree at every other position."""
    hidden, prompt = CONFIG.hidden_size, 2
    trees = [
        {
            "tokens": torch.randint(DRAFT_VOCAB, (NODES,)),
            "parents": torch.tensor(tree(NODES)),
            "log_probs": torch.full((NODES,), -math.log(DRAFT_VOCAB)),
            "accepted": torch.zeros(NODES, dtype=torch.bool),
            "hidden": torch.randn(NODES, hidden),
        }
        for _ in range(ROUNDS)
    ]
    trajectory = make_trajectory(
        request=0, tokens=torch.randint(DRAFT_VOCAB, (prompt + POSITIONS,)), prompt_length=prompt,
        features=torch.zeros(prompt + POSITIONS - 1, 3 * hidden), target={"hidden": torch.randn(POSITIONS, hidden)},
        anchors=list(range(prompt - 1, prompt - 1 + 2 * ROUNDS, 2)), trees=trees, policy_versions=[0] * ROUNDS,
        cache_versions=[0] * ROUNDS, sampling_params=SamplingParams(temperature=0.7, top_p=top_p, seed=0), rule=rule,
        draft_mode="sampled",
    )  # fmt: skip
    return pack([trajectory])


def gradient_step(label: str, plain: bool) -> Callable[[], float]:
    """Return a function that takes a step, and returns the loss."""
    torch.manual_seed(0)
    (name, settings), rule = OBJECTIVES[label], "sample_and_match" if "sample_and_match" in label else "rejection"
    weight = torch.randn(CONFIG.vocab_size, CONFIG.hidden_size) * CONFIG.hidden_size**-0.5
    drafter = HeadAlone(CONFIG, embedding=weight, draft_vocab=torch.arange(DRAFT_VOCAB), feature_layers=(0, 1, 2))
    drafter.plain = plain
    heads = [drafter.lm_head.weight.detach().clone() for _ in range(4 if "each depth" in label else 1)]
    drafter.heads = nn.ParameterList(heads)
    drafter.states = torch.randn(max(STEPS * POSITIONS, ROUNDS * (1 + NODES)), CONFIG.hidden_size).requires_grad_()
    batch = recording(rule, top_p=0.9 if "top-p" in label else 1.0)
    objective = get_objective(name)(drafter, TargetHead(weight), **settings)

    def step() -> float:
        drafter.states.grad = None
        drafter.zero_grad()
        loss = objective(batch)[f"loss_{name}"].sum()
        loss.backward()
        return float(loss.detach())

    return step


def time_of_step(label: str, plain: bool) -> tuple[float, float]:
    """Return the loss, and the least CPU time of two steps after a first."""
    step = gradient_step(label, plain)
    return step(), round(min(cpu_seconds(step) for _ in range(2)), 2)


def peak_of_step(label: str, plain: bool) -> int | None:
    """Return the peak in MiB above what was there before; with gradients, without freed memory that glibc keeps."""
    if not CLEAR.exists():
        return None
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)  # tensors above it are returned as soon as they are freed
    step = gradient_step(label, plain)
    forget_peak()
    before = memory("VmRSS") or 0.0
    step()
    return round((memory("VmHWM") or 0.0) - before)


def in_own_process(run: Callable[[str, bool], Any], label: str, plain: bool) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(run, label, plain).result()


def gradient_steps() -> list[dict[str, Any]]:
    cells = []
    for label in OBJECTIVES:
        ways, losses = {}, []
        for way, plain in (("whole logits", True), ("by chunks", False)):
            loss, seconds = in_own_process(time_of_step, label, plain)
            ways[way] = {"cpu_s": seconds, "peak_mib": in_own_process(peak_of_step, label, plain)}
            losses.append(loss)
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
        cells.append({"objective": label, **ways})
        print(cells[-1], flush=True)
    return cells


# ---- attention of a text and its trees ---------------------------------------------------------------------------

SIZES = ((200, 80), (400, 240), (400, 960), (1000, 800), (1000, 3200))  # tokens of the text, nodes
HEADS, GROUPS, HEAD_SIZE, TREE = 9, 3, 64, 8


def ways_to_attend(text: int, nodes: int) -> tuple[list[Tensor], dict[str, Callable[[], Tensor]]]:
    """Return query, key and value, and ways to attend from a text and its trees of eight nodes, sorted by anchor."""
    trees, parents = nodes // TREE, torch.tensor(tree(TREE))
    depth = depths(parents[None])[0]
    above = torch.arange(TREE).repeat(int(depth.max()), 1).T.clone()  # a node, its parent, ...
    for generation in range(1, above.shape[1]):
        above[:, generation] = parents[above[:, generation - 1].clamp(min=0)].where(above[:, generation - 1] >= 0, -1)
    on_path = (above[:, :, None] == torch.arange(TREE)).any(1)  # of a node, [TREE, TREE]
    ends = torch.stack([on_path[:, node].nonzero().max() + 1 for node in range(TREE)])
    text_seen = torch.linspace(text // trees, text, trees).long().repeat_interleave(TREE)
    first = torch.arange(trees).repeat_interleave(TREE) * TREE
    every_end, paths = ends.repeat(trees) + first, above.repeat(trees, 1)
    branch = torch.where(paths < 0, -1, paths + first[:, None])
    seen = torch.zeros(text + nodes, text + nodes, dtype=torch.bool)
    seen[:text, :text] = torch.ones(text, text).tril()
    seen[text:, :text] = torch.arange(text) < text_seen[:, None]
    seen[text:, text:] = torch.block_diag(*[on_path] * trees)
    query, key, value = parts = [
        torch.randn(1, count, text + nodes, HEAD_SIZE, requires_grad=True) for count in (HEADS, GROUPS, GROUPS)
    ]

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)

    def gathered() -> Tensor:
        """Copy the keys of each node's path, as the attention of EAGLE drafters does."""
        q = query[0, :, text:].view(GROUPS, HEADS // GROUPS, nodes, HEAD_SIZE) * HEAD_SIZE**-0.5
        own_key, own_value = (part[0, :, text:][:, branch.clamp(min=0)] for part in (key, value))
        scores = torch.einsum("grtd,gsd->grts", q, key[0, :, :text]).masked_fill(~seen[text:, :text], -torch.inf)
        to_own = torch.einsum("grtd,gtjd->grtj", q, own_key).masked_fill(branch < 0, -torch.inf)
        to_text, to_path = torch.cat([scores, to_own], -1).softmax(-1).split([text, branch.shape[1]], -1)
        out = torch.einsum("grts,gsd->grtd", to_text, value[0, :, :text])
        out = out + torch.einsum("grtj,gtjd->grtd", to_path, own_value)
        of_text = F.scaled_dot_product_attention(
            query[:, :, :text], key[:, :, :text], value[:, :, :text], is_causal=True, enable_gqa=True
        )
        return torch.cat([of_text, out.reshape(1, HEADS, nodes, HEAD_SIZE)], 2)

    return parts, {
        "gathered paths": gathered,
        "one dense mask": dense,
        "tree_training_attention": lambda: tree_training_attention(query, key, value, text_seen[None], every_end[None]),
    }


def forward_and_backward(run: Callable[[], Tensor], parts: list[Tensor], direction: Tensor) -> list[Tensor]:
    out = run()
    return [out, *torch.autograd.grad(out, parts, direction)]


def attention(repeats: int) -> list[dict[str, Any]]:
    cells = []
    for text, nodes in SIZES:
        torch.manual_seed(0)
        parts, ways = ways_to_attend(text, nodes)
        direction = torch.randn(1, HEADS, text + nodes, HEAD_SIZE)
        results = [forward_and_backward(run, parts, direction) for run in ways.values()]
        for result in results[1:]:
            torch.testing.assert_close(result, results[0], rtol=1e-3, atol=1e-4)
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, run in ways.items():
                taken[name].append(cpu_seconds(forward_and_backward, run, parts, direction))
        ms = {name: round(1e3 * statistics.median(each), 1) for name, each in taken.items()}
        cells.append({"text": text, "nodes": nodes, "cpu_ms": ms})
        print(cells[-1], flush=True)
    return cells


# ---- batch invariance --------------------------------------------------------------------------------------------

PROMPTS = (150, 120)
SHAPES = {
    "plain": TreeShape(0),
    "chain of 4": TreeShape(4),
    "chain of 8": TreeShape(8),
    "tree of 8": TreeShape(4, 4, 8),
}


class Rounds:
    """SmolLM2 in bfloat16 with two slots and an untrained EAGLE-3 drafter; engine and policy are timed one by one."""

    def __init__(self, batch_invariant: bool) -> None:
        model, _ = load_target("smollm2", dtype=torch.bfloat16, device="cpu")
        torch.manual_seed(0)
        drafter = Eagle3Drafter.from_target(TargetParts.of(model), draft_vocab=torch.arange(DRAFT_VOCAB))
        longest = max(SHAPES.values(), key=lambda shape: shape.num_nodes)
        decoder = SpeculativeDecoder(
            model, drafter, lambda: self.waiting.pop() if self.waiting else None, shape=longest, max_length=1024,
            num_slots=2, engine=partial(TransformersEngine, batch_invariant=batch_invariant),
        )  # fmt: skip
        assert decoder.policy is not None
        self.engine, self.env, self.policy = decoder.engine, decoder.env, decoder.policy
        self.waiting: list[Request] = []
        self.prompts = [torch.randint(self.engine.vocab_size, (length,)) for length in PROMPTS]

    def prefill(self) -> float:
        seconds = cpu_seconds(lambda: self.engine.prefill([0, 1], self.prompts))
        for slot in (0, 1):
            self.engine.release(slot)
        return seconds

    def start(self, slots: int) -> None:
        sampling = SamplingParams(max_tokens=800, ignore_eos=True)
        self.waiting = [Request(i, self.prompts[0], sampling) for i in range(slots)]
        self.td = self.env.reset()
        while len(self.engine.store.occupied) < slots:  # the second prompt is read between rounds
            self.round(SHAPES["plain"])

    def round(self, shape: TreeShape) -> float:
        self.policy.shape = shape

        def run() -> None:
            _, self.td = self.env.step_and_maybe_reset(self.policy(self.td))

        return cpu_seconds(run)


@torch.inference_mode()
def batch_invariance(repeats: int) -> dict[str, Any]:
    """Return the median of the ratios of pairs that take turns, by round and number of slots."""
    usual, invariant = Rounds(False), Rounds(True)

    def ratio(run: Callable[[Rounds], float]) -> dict[str, float]:
        pairs = [(run(invariant), run(usual)) for _ in range(repeats + 1)][1:]
        cpu_ms = [round(1e3 * statistics.median(each), 1) for each in zip(*pairs, strict=True)]
        ratios = statistics.median(a / b for a, b in pairs)
        return {"ratio": round(ratios, 2), "invariant_cpu_ms": cpu_ms[0], "usual_cpu_ms": cpu_ms[1]}

    found: dict[str, Any] = {f"prompts of {PROMPTS[0]} and {PROMPTS[1]} tokens": ratio(Rounds.prefill)}
    for slots in (1, 2):
        for each in (usual, invariant):
            each.start(slots)
        for name, shape in SHAPES.items():
            found[f"{name}, slots {slots}"] = ratio(lambda rounds, shape=shape: rounds.round(shape))
    print(found, flush=True)
    return found


# ---- draws -------------------------------------------------------------------------------------------------------

ROWS, COLUMNS = 8, 8192


def drawn_by_chunks(scores: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """Draw as `gumbel_argmax` does, with noise for a few columns at a time."""
    best, tokens = scores.new_full((len(scores),), -torch.inf), torch.zeros(len(scores), dtype=torch.int64)
    for start in range(0, scores.shape[1], COLUMNS):
        token = torch.arange(start, min(start + COLUMNS, scores.shape[1]))
        noise = uniform(seed[:, None], position[:, None], token).log_().neg_().log_().neg_().float()
        value, at = (scores[:, start : start + COLUMNS] + noise).max(-1)
        tokens, best = torch.where(value > best, at + start, tokens), torch.maximum(value, best)
    return tokens


def draws(repeats: int) -> list[dict[str, Any]]:
    cells, ways = [], {"whole rows": gumbel_argmax, "by chunks": drawn_by_chunks}
    for vocab in (49152, 151936):
        torch.manual_seed(0)
        seed, position = torch.arange(ROWS), torch.arange(ROWS) + 100
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats + 1):
            scores, found = torch.randn(ROWS, vocab), []
            for name, draw in ways.items():
                began = time.process_time()
                found.append(draw(scores, seed, position))
                taken[name].append(time.process_time() - began)
            assert torch.equal(*found)
            position += 1
        ms = {name: round(1e3 * statistics.median(each[1:]) / ROWS, 2) for name, each in taken.items()}
        cells.append({"vocab": vocab, "draws": ROWS * (repeats + 1), "cpu_ms_a_row": ms})
        print(cells[-1], flush=True)
    return cells


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(device="cpu")
    parser.add_argument("--repeats", type=int, default=7, help="timings of each way, of which the median counts")
    options = parse(parser)
    if options.device != "cpu":
        parser.error(f"--device {options.device}: these are CPU times; leave it out")
    torch.set_num_threads(options.threads)
    figures = {
        "loss_by_chunks": gradient_steps(),  # first, since a process that has computed by threads must not fork
        "attention_in_training": attention(options.repeats),
        "batch_invariance": batch_invariance(options.repeats),
        "draws": draws(options.repeats),
    }
    write_result(__file__, options, {"threads": options.threads, "repeats": options.repeats, **figures})


if __name__ == "__main__":
    main()
