"""A tiny target and its drafters, for tests on real engines: SGLang's and vLLM's kernels take their sizes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from aurora_rl.models.parts import default_feature_layers
from aurora_rl.policies import EagleDrafter, TargetParts
from aurora_rl.policies.eagle3 import Eagle3Drafter
from aurora_rl.policies.formats.files import save_drafter

VOCAB, HIDDEN, LAYERS, HEAD_SIZE = 512, 64, 8, 32


def write_models(folder: Path) -> Path:
    """Write `target`, a random Llama over bytes, and drafters that often say the same.

    The drafters are `eagle3` and `eagle`, `eagle_whole` with a row for every token, and `published`, which is `eagle3`
    as its authors would have written it.

    Each token's head row is the embedding of another, drawn at random among the tokens that are even or odd as it is,
    and those with a row in the draft head are the even ones. So the target says what belongs to the last token unless
    its layers overrule that, and stretches that can be drafted, of one to dozens of tokens, take turns with others.
    """
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [f"<{i}>" for i in range(len(tokens), VOCAB)]
    backend = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,  # with fewer, layers that SGLang reads for EAGLE-3 by default would coincide
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_SIZE,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},  # not the default: a lost one must show
        max_position_embeddings=512,
        initializer_range=0.07,
        bos_token_id=None,
        eos_token_id=VOCAB - 1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    target = LlamaForCausalLM(config)
    with torch.no_grad():
        target.model.embed_tokens.weight.normal_(std=0.5)
        for parity in (0, 1):
            partners = 2 * torch.randperm(VOCAB // 2) + parity
            target.lm_head.weight[partners] = target.model.embed_tokens.weight[parity::2]
    target.save_pretrained(folder / "target")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokens[-1])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder / "target")
    drafter = Eagle3Drafter.from_target(
        TargetParts.of(target),
        draft_vocab=torch.arange(0, VOCAB, 2),
        feature_layers=default_feature_layers(LAYERS),
    )
    _read_the_last_token(drafter)
    save_drafter(drafter, folder / "eagle3")
    _publish(drafter, folder / "published")
    for name, vocab in (("eagle", torch.arange(0, VOCAB, 2)), ("eagle_whole", torch.arange(VOCAB))):
        eagle = EagleDrafter.from_target(TargetParts.of(target), draft_vocab=vocab)
        _pass_on_the_embedding(eagle)
        save_drafter(eagle, folder / name)
    return folder


def _publish(drafter: Eagle3Drafter, folder: Path) -> None:
    """Write the folder without the library, by the names and entries of public EAGLE-3 checkpoints.

    They say nothing of RoPE and of layers. SGLang refuses those that are cut to a shorter context than it serves.
    """
    own = drafter.state_dict()
    names = [
        *(
            "fc.weight",
            "lm_head.weight",
            "norm.weight",
            "midlayer.hidden_norm.weight",
            "midlayer.input_layernorm.weight",
        ),
        *("midlayer.post_attention_layernorm.weight", *(f"midlayer.self_attn.{x}_proj.weight" for x in "qkvo")),
        *(f"midlayer.mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
    ]
    tokens = drafter.draft_vocab
    tensors = {name: own[name].contiguous() for name in names}
    tensors["d2t"] = tokens - torch.arange(len(tokens))
    tensors["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, tokens, True)
    config = {
        "architectures": ["LlamaForCausalLMEagle3"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "draft_vocab_size": len(tokens), "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN,
        "max_position_embeddings": 512, "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 1,
        "num_key_value_heads": 2, "pad_token_id": 0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "torch_dtype": "float16", "transformers_version": "4.28.1", "use_cache": True, "vocab_size": VOCAB,
        "head_dim": HEAD_SIZE,
    }  # fmt: skip
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


@torch.no_grad()
def _pass_on_the_embedding(drafter: EagleDrafter) -> None:
    """Make it predict the feature that the target would have, did its layers leave the embedding as it is."""
    for parameter in drafter.parameters():
        parameter.normal_(std=0.05)
    drafter.layers[0].post_attention_layernorm.weight.fill_(1.0)
    # Features have twice the scale of embeddings. A quarter of that leaves the drafter in doubt: where it is certain, a
    # node and its child are equally likely, and which of them a tree keeps is anybody's choice.
    drafter.fc.weight[:, :HIDDEN] += 0.5 * torch.eye(HIDDEN)


@torch.no_grad()
def _read_the_last_token(drafter: Eagle3Drafter) -> None:
    """Make it draft what belongs to the token before, with features and random weights as disturbance.

    The head is the target's. Attention compares embeddings and so finds its own position, and passes on what it
    finds: the first 32 numbers of an embedding through head 0, the others through head 2, the first of each KV head.
    """
    for parameter in (drafter.fc.weight, *drafter.midlayer.mlp.parameters()):
        parameter.normal_(std=0.05)
    attention, half = drafter.midlayer.self_attn, HEAD_SIZE
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
        projection.weight.normal_(std=0.05)
    eye = torch.eye(HIDDEN)
    attention.k_proj.weight[:, :HIDDEN] += 3 * eye
    attention.v_proj.weight[:, :HIDDEN] += eye
    for head, part in ((0, slice(0, half)), (2, slice(half, HIDDEN))):
        rows = slice(head * HEAD_SIZE, (head + 1) * HEAD_SIZE)
        attention.q_proj.weight[rows, :HIDDEN] += 3 * eye[part]
        attention.o_proj.weight[:, rows] += eye[part].T
