"""Real vLLM, unpatched and on the CPU, drafts with exported folders (formats/vllm.py) what this library drafts."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from vllm_environment import PYTHON, require

from aurora_rl.policies import Drafter, Eagle3Drafter, MedusaDrafter, TargetParts, TreeShape
from aurora_rl.policies.formats.files import save_drafter
from aurora_rl.storage import read_folder, write_folder
from aurora_rl.testing.tiny import serve

pytestmark = pytest.mark.vllm

VOCAB, HIDDEN, LAYERS, HEADS, KEY_HEADS, HEAD_SIZE = 256, 64, 8, 4, 2, 32  # vLLM has no CPU kernel for smaller heads
DEPTH, NEW_TOKENS = 3, 48
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
PARTNERS = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def _vllm() -> None:
    require()


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    """Says the token whose partner was said last, unless its random layers overrule that."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        head_dim=HEAD_SIZE,
        rope_parameters={"rope_type": "default", "rope_theta": 300.0},  # not the default, which nobody has to read
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.model.embed_tokens.weight.normal_()
    model.lm_head.weight.copy_(model.model.embed_tokens.weight[PARTNERS])
    return model


@pytest.fixture(scope="module")
def draft_vocab() -> Tensor:
    return torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))[: VOCAB * 7 // 8].sort().values


@pytest.fixture(scope="module")
@torch.no_grad()
def eagle3(target: LlamaForCausalLM, draft_vocab: Tensor) -> Eagle3Drafter:
    """Drafts like the target: attention finds its own position and passes its embedding on. The rest disturbs it."""
    torch.manual_seed(2)
    drafter = Eagle3Drafter.from_target(TargetParts.of(target), draft_vocab=draft_vocab)
    for name, parameter in drafter.named_parameters():
        if "norm" in name:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif name != "lm_head.weight":
            parameter.normal_(std=0.1 if name == "fc.weight" else 0.05)
    attention, eye = drafter.midlayer.self_attn, torch.eye(HIDDEN)
    of_queries = eye.view(KEY_HEADS, HEAD_SIZE, HIDDEN).repeat_interleave(HEADS // KEY_HEADS, 0).flatten(0, 1)
    attention.q_proj.weight[:, :HIDDEN] += 3 * of_queries
    attention.k_proj.weight[:, :HIDDEN] += 3 * eye
    attention.v_proj.weight[:, :HIDDEN] += eye
    attention.o_proj.weight += of_queries.T * KEY_HEADS / HEADS
    return drafter


@pytest.fixture(scope="module")
@torch.no_grad()
def medusa(target: LlamaForCausalLM, draft_vocab: Tensor) -> MedusaDrafter:
    """Drafts like the target: a head says the token whose partner's partner, and so on, was said last."""
    torch.manual_seed(3)
    options = {"num_heads": DEPTH, "num_layers": 2, "shared_head": False}
    drafter = MedusaDrafter.from_target(TargetParts.of(target), draft_vocab=draft_vocab, **options)
    said_by = PARTNERS
    for block, head in zip(drafter.blocks, drafter.lm_heads, strict=True):
        said_by = PARTNERS[said_by]
        head.weight.copy_(target.model.embed_tokens.weight[said_by[draft_vocab]])
        for parameter in block.parameters():
            parameter.normal_(std=0.05)
    return drafter


@pytest.fixture(scope="module")
@torch.no_grad()
def shared_medusa(target: LlamaForCausalLM, draft_vocab: Tensor) -> MedusaDrafter:
    """Heads that share the matrix of the next token, so that the deeper ones are seldom right."""
    torch.manual_seed(3)
    drafter = MedusaDrafter.from_target(TargetParts.of(target), draft_vocab=draft_vocab, num_heads=DEPTH, num_layers=2)
    (head,) = drafter.lm_heads
    head.weight.copy_(target.model.embed_tokens.weight[PARTNERS[PARTNERS][draft_vocab]])
    for parameter in drafter.blocks.parameters():
        parameter.normal_(std=0.05)
    return drafter


@pytest.fixture(scope="module")
def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(VOCAB, (length,), generator=generator) for length in (1, 5, 17, 40)]


@pytest.fixture
def vllm_serves(
    target: LlamaForCausalLM, prompts: list[Tensor], tmp_path: Path
) -> Callable[[str, Path], dict[str, Any]]:
    """Texts of all prompts, and the rounds of each: what was drafted, and what was then said."""
    target.save_pretrained(tmp_path / "target")

    def decode(method: str, folder: Path) -> dict[str, Any]:
        task = {
            "target": str(tmp_path / "target"),
            "speculative": {"model": str(folder), "method": method, "num_speculative_tokens": DEPTH},
            "prompts": [prompt.tolist() for prompt in prompts],
            "max_new_tokens": NEW_TOKENS,
        }
        (tmp_path / "task.json").write_text(json.dumps(task))
        # -I: without PYTHONPATH, which may lead to what is for SGLang.
        script, result = Path(__file__).with_name("decode.py"), tmp_path / "result.json"
        command = [PYTHON, "-I", script, tmp_path / "task.json", result]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return json.loads(result.read_text())

    return decode


def agreement(served: dict[str, Any], drafter: Drafter, target: LlamaForCausalLM, prompts: list[Tensor]) -> list[bool]:
    """Whether each of vLLM's rounds drafted and accepted what ours did at that place; texts have to be equal.

    vLLM has a first token before its first round. Our engine gets it as the end of the prompt, so rounds begin alike.
    """
    shape, said = TreeShape(DEPTH), served["texts"]
    whole = serve(drafter, target, prompts, shape=shape, max_new_tokens=NEW_TOKENS, num_slots=4)
    for prompt, text, trajectory in zip(prompts, said, whole, strict=True):
        assert text == trajectory["sequence", "tokens"][len(prompt) :].tolist()
    begun = [torch.cat([prompt, torch.tensor(text[:1])]) for prompt, text in zip(prompts, said, strict=True)]
    trajectories = serve(drafter, target, begun, shape=shape, max_new_tokens=NEW_TOKENS - 1, num_slots=4)
    equal = []
    for prompt, rounds, trajectory in zip(prompts, served["rounds"], trajectories, strict=True):
        assert rounds[0]["drafted"] == [] and len(rounds[0]["said"]) == 1
        offset, place = trajectory["rounds", "offset"].tolist(), len(prompt)
        nodes = trajectory["nodes"]
        here = {
            anchor: (nodes["tokens"][start:end].tolist(), int(nodes["accepted"][start:end].sum()))
            for anchor, (start, end) in zip(trajectory["rounds", "anchor"].tolist(), pairwise(offset), strict=True)
        }
        for each in rounds[1:]:
            # Past its end a text is cut, here before it is counted.
            room = len(trajectory["sequence", "tokens"]) - 1 - place
            equal.append((each["drafted"], min(len(each["said"]) - 1, room)) == here.get(place))
            place += len(each["said"])
    return equal


def test_an_eagle3_checkpoint_drafts_in_vllm_as_here(eagle3, target, prompts, vllm_serves, tmp_path):
    save_drafter(eagle3, tmp_path / "exported", "vllm")
    served = vllm_serves("eagle3", tmp_path / "exported")
    assert served["layers"] == list(eagle3.feature_layers)
    equal = agreement(served, eagle3, target, prompts)
    assert len(equal) > 50 and all(equal)
    assert {len(each["said"]) for rounds in served["rounds"] for each in rounds} == set(range(1, DEPTH + 2))

    # SGLang's ids in the place that vLLM reads: the comparison must be able to fail.
    tensors, config = read_folder(tmp_path / "exported", "config.json")
    write_folder(tmp_path / "off", tensors, {"config.json": config | {LAYER_IDS: config["eagle_config"][LAYER_IDS]}})
    equal = agreement(vllm_serves("eagle3", tmp_path / "off"), eagle3, target, prompts)
    assert sum(equal) < 0.7 * len(equal)


def test_a_medusa_checkpoint_drafts_in_vllm_as_here(medusa, target, prompts, vllm_serves, tmp_path):
    save_drafter(medusa, tmp_path / "exported", "vllm")
    served = vllm_serves("medusa", tmp_path / "exported")
    equal = agreement(served, medusa, target, prompts)
    assert len(equal) > 50 and all(equal)
    assert {len(each["said"]) for rounds in served["rounds"] for each in rounds} == set(range(1, DEPTH + 2))


def test_heads_that_share_a_matrix_draft_in_vllm_as_here(shared_medusa, target, prompts, vllm_serves, tmp_path):
    save_drafter(shared_medusa, tmp_path / "exported", "vllm")
    equal = agreement(vllm_serves("medusa", tmp_path / "exported"), shared_medusa, target, prompts)
    assert len(equal) > 50 and all(equal)
