"""The arithmetic of docs/scaling.md, from the code's own layouts: bytes of trajectories and weights, and FLOPs.

Bytes are those of trajectories that `make_trajectory` lays out in the shapes of a large target, without its weights.
Parameters are those of an EAGLE-3 drafter of its shapes. FLOPs of a gradient step are counted by PyTorch on a small
drafter and target, and compared with the formula that is then used for the large ones.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write_result
from tensordict import TensorDict
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from aurora_rl import SamplingParams
from aurora_rl.collectors.codec import encode
from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives import ImitationLoss
from aurora_rl.policies import Eagle3Drafter
from aurora_rl.trajectories import make_trajectory, pack, size_of

LAYERS = 3  # of which features are recorded
PROMPT, COMPLETION = 1024, 512
NODES, PER_ROUND = 4, 2.5  # drafted in a round (the default chain), and tokens that it delivers
DRAFT_VOCAB = 32_000
STEPS = 4  # depths of the imitation loss: those of the trees that are served
LIKELIEST = 64  # tokens of a row where an engine gives these in place of hidden states


@dataclass(frozen=True)
class Model:
    """Shapes of a target; the drafter's layer takes them over, as `layer_config` does.

    Attributes:
        total: Parameters of the target.
        active: Those that a token uses.
        inner: Width of the drafter's MLP.
    """

    name: str
    total: float
    active: float
    hidden: int
    heads: int
    key_heads: int
    head_dim: int
    inner: int
    vocab: int


MODELS = (
    Model("70B", 70.6e9, 70.6e9, 8192, 64, 8, 128, 28_672, 128_256),  # Llama 3.3 70B
    Model("229B", 229e9, 10e9, 3072, 48, 8, 128, 1536, 200_064),  # MiniMax-M2, a mixture of experts
)


# ---- bytes -----------------------------------------------------------------------------------------------------------


def recorded(model: Model, form: str, prompt: int, completion: int) -> TensorDict:
    """A trajectory in the shapes of a target; its tensors have these sizes and hardly any memory."""

    def rows(count: int, *width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(1, *(1 for _ in width), dtype=dtype).expand(count, *width)

    def target(count: int) -> dict[str, torch.Tensor]:
        if form == "hidden":
            return {"hidden": rows(count, model.hidden)}
        ids, logs = rows(count, LIKELIEST, dtype=torch.int64), rows(count, LIKELIEST, dtype=torch.float32)
        return {"topk_ids": ids, "topk_log_probs": logs, "tail_log_prob": rows(count, dtype=torch.float32)}

    rounds = round(completion / PER_ROUND)
    tree = {
        "tokens": torch.arange(NODES),
        "parents": torch.arange(NODES) - 1,
        "accepted": torch.zeros(NODES, dtype=torch.bool),
        "log_probs": torch.zeros(NODES),
        **target(NODES),
    }
    return make_trajectory(
        request=0,
        tokens=torch.zeros(prompt + completion, dtype=torch.int64),
        prompt_length=prompt,
        features=rows(prompt + completion - 1, LAYERS * model.hidden),
        target=target(completion),
        anchors=[prompt - 1 + int(number * PER_ROUND) for number in range(rounds)],
        trees=[tree] * rounds,
        policy_versions=[0] * rounds,
        cache_versions=[0] * rounds,
        sampling_params=SamplingParams(),
    )


def completion_bytes(model: Model, form: str = "hidden", prompt: int = PROMPT, completion: int = COMPLETION) -> int:
    """Bytes of a request's trajectory."""
    return size_of(recorded(model, form, prompt, completion))


def bytes_of(model: Model, form: str) -> dict[str, Any]:
    """Bytes of a trajectory, by what causes them."""
    whole, twice = (completion_bytes(model, form, PROMPT, count) for count in (COMPLETION, 2 * COMPLETION))
    longer = completion_bytes(model, form, 2 * PROMPT, COMPLETION)
    trajectory = recorded(model, form, PROMPT, COMPLETION)
    return {
        "form": form,
        "per_prompt_token": round((longer - whole) / PROMPT, 1),
        "per_completion_token": round((twice - whole) / COMPLETION, 1),
        "features": size_of(trajectory["sequence"].select("features")),
        "target_of_sequence": size_of(trajectory["sequence"].exclude("features", "tokens", "prompt_length")),
        "target_of_nodes": size_of(trajectory["nodes"].exclude("tokens", "parents", "log_probs", "accepted")),
        "request": whole,
        "header": len(encode("trajectory", {}, trajectory.exclude("sequence", "nodes"))[0]),
    }


# ---- parameters and FLOPs --------------------------------------------------------------------------------------------


def drafter_of(model: Model) -> Eagle3Drafter:
    """An EAGLE-3 drafter in the shapes of a target, without memory."""
    config = LlamaConfig(
        hidden_size=model.hidden,
        intermediate_size=model.inner,
        num_attention_heads=model.heads,
        num_key_value_heads=model.key_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab,
        num_hidden_layers=1,
    )
    with torch.device("meta"):
        return Eagle3Drafter(
            config,
            embedding=torch.empty(model.vocab, model.hidden),
            draft_vocab=torch.arange(min(DRAFT_VOCAB, model.vocab)),
            feature_layers=tuple(range(LAYERS)),
        )


def drafter_parameters(model: Model) -> int:
    """Parameters that are learned and published."""
    return sum(parameter.numel() for parameter in drafter_of(model).parameters())


def learner_flops(model: Model) -> dict[str, float]:
    """FLOPs of a gradient step for a position, without attention to earlier positions.

    A matrix of n weights takes 2n forward and 4n backward. Joined features, and the first keys and values, are computed
    once at all positions; nothing goes back from the features to the engine. A position of a completion takes queries,
    output, MLP and draft head for each depth, and further keys and values for each but the first. The target's head is
    frozen: 2n.
    """
    fc, keys_values = LAYERS * model.hidden**2, 2 * 2 * model.hidden * model.key_heads * model.head_dim
    rest = drafter_parameters(model) - fc - keys_values
    prompt = 4.0 * fc + 6.0 * keys_values
    drafter = prompt + 6.0 * (STEPS * rest + (STEPS - 1) * keys_values)
    return {"prompt": prompt, "completion": drafter + 2.0 * model.hidden * model.vocab}


def counted_flops(prompt: int = 8, completion: int = 56) -> dict[str, float]:
    """Count the FLOPs of a gradient step on a small drafter, and compare them with the formula."""
    model = Model("small", 0, 0, 256, 4, 2, 64, 1024, 2048)
    config = drafter_of(model).config
    drafter = Eagle3Drafter(
        config,
        embedding=torch.randn(model.vocab, model.hidden),
        draft_vocab=torch.arange(model.vocab),
        feature_layers=tuple(range(LAYERS)),
    )
    head = TargetHead(torch.randn(model.vocab, model.hidden) / model.hidden**0.5)
    trajectory = recorded(model, "hidden", prompt, completion)
    trajectory = trajectory.apply(lambda each: each.float() if each.is_floating_point() else each.contiguous())

    def in_place(total: torch.Size, a: torch.Size, b: torch.Size, **_: object) -> int:
        return 2 * a.numel() * b[1]

    # The draft head's gradient is summed in place, and the counter knows `addmm` alone.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        out = ImitationLoss(drafter, head, steps=STEPS)(pack([trajectory]))
        out["loss_imitation"].backward()
    each = learner_flops(model)
    expected = (prompt - 1) * each["prompt"] + completion * each["completion"]
    return {
        "prompt": prompt,
        "completion": completion,
        "counted": float(counter.get_total_flops()),
        "formula": expected,
        "counted_over_formula": round(counter.get_total_flops() / expected, 3),
    }


def figures_of(model: Model) -> dict[str, Any]:
    parameters, flops = drafter_parameters(model), learner_flops(model)
    request = PROMPT * flops["prompt"] + COMPLETION * flops["completion"]
    return {
        **asdict(model),
        "drafter_parameters": parameters,
        "weights_bytes_bfloat16": 2 * parameters,
        "bytes": [bytes_of(model, form) for form in ("hidden", "topk")],
        "learner_flops_per_position": flops,
        "learner_flops_per_completion_token": request / COMPLETION,
        "target_flops_per_token": 2 * model.active,
        # The engine passes over the prompt as well, and over every drafted node.
        "learner_over_engine": round(request / (2 * model.active * (PROMPT + COMPLETION / PER_ROUND * (NODES + 1))), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", help="name of the result file")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    assumed = {
        "prompt_tokens": PROMPT,
        "completion_tokens": COMPLETION,
        "nodes_of_a_round": NODES,
        "tokens_of_a_round": PER_ROUND,
        "draft_vocab": DRAFT_VOCAB,
        "depths_of_the_loss": STEPS,
        "likeliest_tokens": LIKELIEST,
    }
    models = [figures_of(model) for model in MODELS]
    write_result(__file__, options, {"assumed": assumed, "models": models, "flops": counted_flops()})


if __name__ == "__main__":
    main()
