"""SGLang's own server, unpatched, in processes of its own: what it needs on a CPU is in `tests/sglang_cpu`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sglang_requests import Learner, environment
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from aurora_rl.collectors.handshake import Handshake
from aurora_rl.envs.sglang.client import SGLangClient
from aurora_rl.models.parts import default_feature_layers
from aurora_rl.policies import EagleDrafter, TargetParts
from aurora_rl.policies.eagle3 import Eagle3Drafter
from aurora_rl.policies.formats.files import load_drafter, save_drafter

VOCAB, HIDDEN, LAYERS, HEAD_SIZE = 512, 64, 8, 32


# Tests with servers of their own. Under xdist one process takes these, and another all that share `chain` and `tree`.
SECOND = ("test_client_attach.py", "[eagle_chain", "[eagle_tree", "[published_chain")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    from xdist.scheduler import LoadScopeScheduling

    class ByServer(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "second" if any(part in nodeid for part in SECOND) else "first"

    return ByServer(config, log)


def why_not() -> str:
    """Why SGLang cannot be imported here; empty where it can."""
    if importlib.util.find_spec("sglang") is None:
        return "SGLang is not installed; `make install` brings it"
    # In a process of its own: an import of SGLang changes much of the process that it happens in.
    code = "import sglang, xgrammar"
    tried = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment(), "SGLANG_USE_CPU_ENGINE": "1"},
        capture_output=True,
        text=True,
    )
    return "" if tried.returncode == 0 else f"SGLang cannot be imported: {tried.stderr.strip().splitlines()[-1]}"


@pytest.fixture(scope="session")
def launch(sglang_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SGLangClient]:
    """Starts a server that drafts as it is told to; a context manager that ends it."""
    # Where SGLang is required, a server that cannot be launched fails the tests and quotes its log.
    required = "sglang" in os.environ.get("AURORA_RL_REQUIRE", "").split(",")
    if not required and (reason := why_not()):
        pytest.skip(reason)

    def start(
        depth: int, width: int, num_nodes: int, drafter: str = "eagle3", arguments: Sequence[str] = ()
    ) -> SGLangClient:
        return SGLangClient.launch(
            sglang_models / "target",
            drafter=sglang_models / drafter,
            depth=depth,
            width=width,
            num_nodes=num_nodes,
            dtype="float32",
            max_length=480,
            log=tmp_path_factory.mktemp("sglang") / "log",
            arguments=["--chunked-prefill-size", "256", *arguments],
            environment=environment(),
        )

    return start


@pytest.fixture(scope="session")
def chain(launch: Callable[..., SGLangClient]) -> Iterator[SGLangClient]:
    """A server that drafts chains of three; tests leave it without a learner and with the drafter's own weights."""
    with launch(3, 1, 3) as engine:
        yield engine


@pytest.fixture(scope="session")
def tree(launch: Callable[..., SGLangClient]) -> Iterator[SGLangClient]:
    """A server that drafts trees of depth 2, four nodes expanded, seven kept.

    Not deeper: SGLang keeps the drafter's keys by place among the expanded nodes. From depth 3 on a node may see those
    of another branch, and the trees are not what the drafter's definition gives (docs/sglang.md).
    """
    with launch(2, 4, 7) as engine:
        yield engine


@pytest.fixture(scope="session")
def eagle_chain(launch: Callable[..., SGLangClient]) -> Iterator[SGLangClient]:
    """Two replicas that draft chains of three by an EAGLE drafter of the whole vocabulary."""
    with launch(3, 1, 3, "eagle_whole", ["--dp-size", "2"]) as engine:
        yield engine


@pytest.fixture(scope="session")
def eagle_tree(launch: Callable[..., SGLangClient]) -> Iterator[SGLangClient]:
    """As `tree`, by an EAGLE drafter of a reduced vocabulary."""
    with launch(2, 4, 7, "eagle") as engine:
        yield engine


@pytest.fixture(scope="session")
def published_chain(launch: Callable[..., SGLangClient]) -> Iterator[SGLangClient]:
    """Two ranks that draft chains of three by an EAGLE-3 folder as its authors publish them."""
    with launch(3, 1, 3, "published", ["--tp-size", "2"]) as engine:
        yield engine


@pytest.fixture(scope="session")
def sglang_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `target`, a random Llama over bytes, and drafters that often say the same.

    They are `eagle3` and `eagle`, `eagle_whole` with a row for every token, and `published`, which is `eagle3` as its
    authors would have written it.

    Each token's head row is the embedding of another, drawn at random among the tokens that are even or odd as it is,
    and those with a row in the draft head are the even ones. So the target says what belongs to the last token unless
    its layers overrule that, and stretches that can be drafted, of one to dozens of tokens, take turns with others.
    """
    folder = tmp_path_factory.mktemp("models")
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [f"<{i}>" for i in range(len(tokens), VOCAB)]
    backend = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,  # with fewer, layers that SGLang captures for EAGLE-3 by default would coincide
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


@pytest.fixture(scope="module")
def model(sglang_models):
    return AutoModelForCausalLM.from_pretrained(sglang_models / "target", dtype=torch.float32).requires_grad_(False)


@pytest.fixture(scope="module")
def parts(model):
    return TargetParts.of(model)


@pytest.fixture(scope="module")
def drafter(sglang_models, parts):
    return load_drafter(sglang_models / "eagle3", parts)


@pytest.fixture(scope="module")
def handshake(parts, drafter):
    return Handshake.of(parts, drafter, "eagle3")


@pytest.fixture
def learner(handshake):
    ends = Learner(handshake)
    yield ends
    ends.die()
