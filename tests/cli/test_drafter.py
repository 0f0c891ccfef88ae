"""`aurora-rl drafter`: folders are started, written for engines, and looked into."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf_files import target_gguf, tensors
from safetensors.torch import load_file

from aurora_rl.cli import assembly, spec
from aurora_rl.cli import main as cli
from aurora_rl.cli.config import load_config
from aurora_rl.policies.adapters import adapted_layers, merge_adapter
from aurora_rl.policies.formats.files import save_drafter

# ---- init -----------------------------------------------------------------------------------------------------------


def init(out: Path, *pairs: str) -> int:
    return cli.main(["drafter", "init", "--out", str(out), *pairs])


@pytest.fixture
def target(tiny_folder: Path) -> list[str]:
    return [f"model={tiny_folder}", "device=cpu", "dtype=float32", "drafter.vocab_size=64", "engine.max_length=256"]


def test_init_writes_a_folder_that_serve_and_engines_load(
    target: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(tmp_path / "d0", *target, "drafter.name=eagle3", "drafter.feature_layers=[1,2]") == 0
    assert capsys.readouterr().out.endswith(f"untrained, written to {tmp_path / 'd0'} (vllm)\n")
    config = load_config(overrides=[*target, "drafter.name=eagle3", f"drafter.path={tmp_path / 'd0'}"])
    read = assembly.start_drafter(spec.resolve(config), assembly.load(spec.resolve(config)), [])
    assert read.feature_layers == (1, 2) and len(read.draft_vocab) == 64
    assert cli.main(["drafter", "inspect", str(tmp_path / "d0")]) == 0
    out = capsys.readouterr().out
    assert all(f"engine {name} " in out for name in ("aurora_rl", "sglang", "vllm"))


def test_the_draft_vocabulary_is_of_the_traffic(target: list[str], tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "zzz QQQ"}]}) + "\n")
    pairs = [*target[:3], "drafter.vocab_size=8", "drafter.name=medusa", "engine.max_length=256"]
    vocab = {}
    for name, more in (("chats", [f"traffic.path={chats}"]), ("built-in", [])):
        assert init(tmp_path / name, "--to", "aurora_rl", *pairs, *more) == 0
        offsets = load_file(tmp_path / name / "model.safetensors")["d2t"]
        vocab[name] = set((offsets + torch.arange(8)).tolist())
    config = load_config(overrides=pairs)
    asked = assembly.load(spec.resolve(config)).tokenizer("zzz QQQ")["input_ids"]
    assert set(asked) <= vocab["chats"] and not set(asked) <= vocab["built-in"]


def test_init_refuses_what_has_no_folder(target: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(tmp_path / "d0", *target, "drafter.name=ngram") == 2
    assert "drafter.name=ngram has no weights to write; serve it by its name, or start another" in (
        capsys.readouterr().err
    )
    unread = ["model=/nowhere", *target[1:], "drafter.name=medusa"]  # loading it would be another error
    assert init(tmp_path / "d0", "--to", "gguf", *unread) == 2
    assert "--to gguf: MedusaDrafter has no format 'gguf'; it has aurora_rl, vllm" in capsys.readouterr().err
    assert init(tmp_path / "d0", *target, "drafter.name=medusa", f"drafter.path={tmp_path / 'mine'}") == 2
    assert capsys.readouterr().err == (
        f"aurora-rl: drafter.path={tmp_path / 'mine'}: drafter init starts an untrained drafter; leave the key out, or "
        f"write that drafter by aurora-rl drafter export --drafter {tmp_path / 'mine'}\n"
    )
    assert not (tmp_path / "d0").exists()
    model = shutil.copytree(Path(target[0].partition("=")[2]), tmp_path / "model")  # as after a slip of --out
    before = sorted(path.name for path in model.iterdir())
    assert init(model, *target, "drafter.name=medusa") == 2
    assert "holds other things than a drafter" in capsys.readouterr().err
    assert sorted(path.name for path in model.iterdir()) == before


def test_a_drafter_is_replaced_only_if_that_is_said(
    target: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    assert init(out, *target, "drafter.name=eagle3", "drafter.feature_layers=[1,2]") == 0
    trained = (out / "model.safetensors").read_bytes()
    capsys.readouterr()
    refusal = f"aurora-rl: --out {out} holds a drafter already; name another folder, or add --overwrite\n"
    assert init(out, *target, "drafter.name=medusa") == 2 and capsys.readouterr().err == refusal
    assert export(out, out, "--to", "sglang", *target[:3]) == 2 and capsys.readouterr().err == refusal
    assert (out / "model.safetensors").read_bytes() == trained
    assert init(out, "--overwrite", *target, "drafter.name=medusa") == 0
    assert "Medusa" in json.loads((out / "config.json").read_text())["architectures"][0]


def test_the_working_directory_is_not_replaced_by_a_drafter(
    target: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refusal = "aurora-rl: --out {} is the working directory; name a folder in it\n"
    for out, named in ((Path(), "."), (tmp_path, tmp_path)):
        assert init(out, *target, "drafter.name=medusa") == 2 and capsys.readouterr().err == refusal.format(named)
        assert export(tmp_path / "mine", out, "--to", "sglang") == 2 and capsys.readouterr().err == refusal.format(
            named
        )
    assert init(Path("d0"), *target, "drafter.name=medusa") == 0
    monkeypatch.chdir(tmp_path / "d0")
    capsys.readouterr()
    assert cli.main(["drafter", "inspect", "."]) == 0
    assert "architecture      MedusaDrafter" in capsys.readouterr().out


# ---- inspect --------------------------------------------------------------------------------------------------------


def test_inspect_prints_what_a_folder_holds(
    target: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "d0"
    assert init(folder, "--to", "sglang", *target, "drafter.name=eagle3", "drafter.feature_layers=[1,2]") == 0
    capsys.readouterr()
    assert cli.main(["drafter", "inspect", str(folder)]) == 0
    tensors = load_file(folder / "model.safetensors")
    parameters = sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())
    trained_for = json.loads((folder / "config.json").read_text())["aurora_rl_made_for"]
    size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    assert capsys.readouterr().out.splitlines() == [
        "architecture      Eagle3Drafter (LlamaForCausalLMEagle3)",
        "format            sglang",
        f"trained for       target weights {trained_for}",
        "vocabulary        64 of 300 tokens",
        "feature layers    1, 2",
        f"parameters        {parameters:,} in float32",
        f"size              {size:.1f} MiB",
        f"engine aurora_rl  aurora-rl serve model=TARGET drafter.name=eagle3 drafter.path={folder}",
        "engine sglang     python -m sglang.launch_server --model-path TARGET --speculative-algorithm EAGLE3 "
        f"--speculative-draft-model-path {folder}",
    ]


@pytest.mark.parametrize(
    ("name", "layout", "format", "rows", "layers"),
    [
        ("medusa", "aurora_rl", "aurora_rl", "64 of 300", "3"),
        ("medusa", "vllm", "vllm", "64 of 300", "3"),
        ("eagle", "hf", "hf", "64 of 300", "not stated: the architecture's own"),
        ("dflash", "sglang", "sglang", "64 of 300", "1, 2"),
        ("standalone", "hf", "sglang, vllm", "64 of 300", "not stated: the architecture's own"),
    ],
)
def test_inspect_knows_every_architecture(
    target: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    layout: str,
    format: str,
    rows: str,
    layers: str,
) -> None:
    own = ["drafter.feature_layers=[1,2]"] if name == "dflash" else []
    assert init(tmp_path / "d0", "--to", layout, *target, f"drafter.name={name}", *own) == 0
    capsys.readouterr()
    assert cli.main(["drafter", "inspect", str(tmp_path / "d0"), *target[:3]]) == 0
    lines = dict((line[:18].strip(), line[18:]) for line in capsys.readouterr().out.splitlines())
    assert lines["format"] == format and lines["feature layers"] == layers
    assert lines["vocabulary"] == f"{rows} tokens" and lines["target"].endswith(": fits")


def test_inspect_says_that_no_engine_loads_layer_0(
    target: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = spec.resolve(load_config(overrides=[*target, "drafter.name=eagle3", "drafter.feature_layers=[0,1]"]))
    save_drafter(assembly.start_drafter(run, assembly.load(run), []), tmp_path / "d0")
    assert cli.main(["drafter", "inspect", str(tmp_path / "d0"), *target[:3]]) == 0
    out = capsys.readouterr().out
    assert (
        "format            sglang; no engine loads a drafter that reads layer 0\n" in out and "launch_server" not in out
    )


def test_inspect_says_why_a_drafter_does_not_fit(
    target: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "d0"
    assert init(folder, *target, "drafter.name=eagle3", "drafter.feature_layers=[1,2]") == 0
    entries = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**entries, "aurora_rl_made_for": "of another"}))
    capsys.readouterr()
    assert cli.main(["drafter", "inspect", str(folder), *target[:3]]) == 1
    assert "does not fit" in (out := capsys.readouterr().out) and "drafter.trained_for=any" in out
    assert cli.main(["drafter", "inspect", str(folder), *target[:3], "drafter.trained_for=any"]) == 0
    assert cli.main(["drafter", "inspect", str(folder), "drafter.name=medusa"]) == 2
    assert capsys.readouterr().err == (
        f"aurora-rl: drafter.name=medusa: {folder} holds a drafter of Eagle3Drafter; leave the key out\n"
    )
    assert cli.main(["drafter", "inspect", str(folder), "drafter.name=eagle3"]) == 0
    (folder / "config.json").write_text(json.dumps({**entries, "architectures": ["Unheard"]}))
    assert cli.main(["drafter", "inspect", str(folder)]) == 2
    assert f"{folder}: config.json: no drafter is of architectures ['Unheard']" in capsys.readouterr().err
    (folder / "config.json").write_text(json.dumps({**entries, "vocab_size": None}))
    assert cli.main(["drafter", "inspect", str(folder)]) == 2
    assert f"{folder}: config.json: vocab_size must be an integer, got None" in capsys.readouterr().err
    assert cli.main(["drafter", "inspect", str(tmp_path / "nowhere")]) == 2
    assert "is not a checkpoint" in capsys.readouterr().err


# ---- export ---------------------------------------------------------------------------------------------------------


def export(drafter: Path, out: Path, *more: str) -> int:
    return cli.main(["drafter", "export", "--drafter", str(drafter), "--out", str(out), *more])


def test_export_writes_what_an_engine_reads_and_reads_it_back(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [f"model={tiny_folder}", "device=cpu", "dtype=float32"]
    settings = [*pairs, "drafter.vocab_size=64", "drafter.name=eagle3"]
    target = assembly.load(spec.resolve(load_config(overrides=settings)))
    # Of the target's three layers SGLang cannot read the default, and "hf" does not name others.
    for layout, layers, again in (("vllm", "[1,2]", "sglang"), ("hf", "null", "vllm"), ("sglang", "[1,2]", "sglang")):
        run = spec.resolve(load_config(overrides=[*settings, f"drafter.feature_layers={layers}"]))
        save_drafter(assembly.start_drafter(run, target, []), tmp_path / "ours")
        there, back = tmp_path / layout, tmp_path / f"from-{layout}"
        assert export(tmp_path / "ours", there, "--to", layout, *pairs) == 0
        assert export(there, back, "--from", layout, "--to", again, *pairs) == 0
        assert load_file(back / "model.safetensors").keys() == load_file(tmp_path / "ours" / "model.safetensors").keys()
        for name, tensor in load_file(tmp_path / "ours" / "model.safetensors").items():
            assert torch.equal(load_file(back / "model.safetensors")[name], tensor)
    assert f"Eagle3Drafter for {tiny_folder} written to {tmp_path / 'vllm'} (vllm)" in capsys.readouterr().out


def test_export_of_a_class_that_the_library_does_not_know(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other_heads.py").write_text(
        "from aurora_rl.policies import MedusaDrafter\nclass OtherHeads(MedusaDrafter):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    pairs = [f"model={tiny_folder}", "device=cpu", "dtype=float32"]
    named = [*pairs, "drafter.name=other_heads:OtherHeads"]
    config = load_config(overrides=[*named, "drafter.vocab_size=64"])
    save_drafter(
        assembly.start_drafter(spec.resolve(config), assembly.load(spec.resolve(config)), []), tmp_path / "saved"
    )
    assert export(tmp_path / "saved", tmp_path / "vllm", "--to", "vllm", *named) == 0
    assert export(tmp_path / "vllm", tmp_path / "back", "--from", "vllm", "--to", "aurora_rl", *named) == 0
    back, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("back", "saved"))
    assert back.keys() == saved.keys() and all(torch.equal(back[name], tensor) for name, tensor in saved.items())
    assert "OtherHeads for" in capsys.readouterr().out
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert export(tmp_path / "saved", Path("here"), "--to", "vllm", *named) == 0  # empty, and by a relative path
    assert (
        load_file(tmp_path / "here" / "model.safetensors").keys()
        == load_file(tmp_path / "vllm" / "model.safetensors").keys()
    )
    assert export(tmp_path / "saved", tmp_path / "again", "--to", "vllm", *pairs) == 0  # it is imported by now
    entries = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert entries["aurora_rl_drafter"] == "other_heads:OtherHeads"
    entries["aurora_rl_drafter"] = "elsewhere:OtherHeads"
    (tmp_path / "saved" / "config.json").write_text(json.dumps(entries))
    assert export(tmp_path / "saved", tmp_path / "third", "--to", "vllm", *pairs) == 2
    assert "set drafter.name=elsewhere:OtherHeads, or in Python import elsewhere first" in capsys.readouterr().err


def test_options_are_of_the_class_that_the_folder_says(
    target: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["drafter.feature_layers=[1,2]", "drafter.options={fc_norm: true}"]
    assert init(tmp_path / "d0", *target, "drafter.name=eagle3", *own) == 0
    pairs = [*target[:3], "drafter.options={fc_norm: true}"]
    assert export(tmp_path / "d0", tmp_path / "vllm", "--to", "vllm", *pairs) == 0
    assert cli.main(["drafter", "inspect", str(tmp_path / "d0"), *pairs]) == 0
    capsys.readouterr()
    assert export(tmp_path / "d0", tmp_path / "again", "--to", "vllm", *target[:3], "drafter.options={heads: 3}") == 2
    assert "drafter.options: Eagle3Drafter has no setting 'heads'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["nowhere/at/all", "out", "--to", "sglang"], "is not a checkpoint"),
        (  # loading the target would be another error
            ["OURS", "out", "--to", "tensorrt", "model=/nowhere"],
            "aurora-rl: --to tensorrt: Eagle3Drafter has no format 'tensorrt'; it has sglang, vllm, hf, gguf\n",
        ),
        (["OURS", "out", "--to", "vllm", "--from", "gguf"], "Eagle3Drafter has no format 'gguf'"),
        (
            ["OURS", "out", "--to", "vllm", "drafter.name=medusa"],
            "ours holds a drafter of Eagle3Drafter; leave the key out",
        ),
        (["OURS", "out", "--to", "vllm", "drafter.name=medsua"], "no drafter is called 'medsua'"),
    ],
)
def test_export_says_what_it_cannot_do(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], wrong: str
) -> None:
    pairs = [f"model={tiny_folder}", "device=cpu", "dtype=float32"]
    config = load_config(overrides=[*pairs, "drafter.vocab_size=64", "drafter.name=eagle3"])
    save_drafter(
        assembly.start_drafter(spec.resolve(config), assembly.load(spec.resolve(config)), []), tmp_path / "ours"
    )
    drafter, out, *rest = arguments
    drafter = str(tmp_path / "ours") if drafter == "OURS" else drafter
    assert export(Path(drafter), tmp_path / out, *pairs, *rest) == 2
    assert wrong in capsys.readouterr().err and not (tmp_path / out).exists()


def test_export_to_gguf_takes_the_vocabulary_of_the_target_s_file(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [f"model={tiny_folder}", "device=cpu", "dtype=bfloat16"]
    shape = ["drafter.vocab_size=64", "drafter.name=eagle3", "drafter.feature_layers=[0,1,2]"]
    assert init(tmp_path / "ours", "--to", "vllm", *pairs, *shape) == 0
    target = target_gguf(tmp_path / "target.gguf", vocab_size=300, hidden_size=32)
    named = ["--to", "gguf", "--target-gguf", str(target), *pairs]
    out = tmp_path / "drafter.gguf"
    assert export(tmp_path / "ours", out, "--to", "gguf", *pairs) == 2
    assert "give both --to gguf and --target-gguf TARGET.gguf, or neither" in capsys.readouterr().err
    assert export(tmp_path / "ours", out, "--to", "vllm", "--target-gguf", str(target), *pairs) == 2
    assert "--to vllm --target-gguf" in capsys.readouterr().err and not out.exists()
    assert export(tmp_path / "ours", out, *named) == 0
    assert capsys.readouterr().out == f"Eagle3Drafter for {tiny_folder} written to {out} (gguf)\n"
    head = tensors(out)["output.weight"]
    assert head[0].name == "BF16" and torch.equal(
        torch.from_numpy(head[1]), load_file(tmp_path / "ours" / "model.safetensors")["lm_head.weight"].float()
    )
    assert export(tmp_path / "ours", out, *named) == 2
    assert f"--out {out} holds a drafter already" in capsys.readouterr().err
    assert export(tmp_path / "ours", out, "--overwrite", *named) == 0
    assert export(tmp_path / "ours", target, "--overwrite", *named) == 2
    assert "target.gguf is no GGUF file of an EAGLE-3 and would be lost" in capsys.readouterr().err


def test_adapters_are_listed_and_merged_into_what_is_exported(
    target: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [*target, "drafter.name=eagle3", "drafter.feature_layers=[1,2]", "drafter.adapters=[acme,globex]"]
    resolved = spec.resolve(load_config(overrides=[*pairs, "drafter.adapter_rank=2"]))
    started = assembly.start_drafter(resolved, assembly.load(resolved), [])
    for layer in adapted_layers(started).values():
        torch.nn.init.normal_(layer.lora_B)
    save_drafter(started, tmp_path / "learned")
    assert cli.main(["drafter", "inspect", str(tmp_path / "learned")]) == 0
    assert "\nadapters          acme (rank 2), globex (rank 2)\n" in capsys.readouterr().out
    for name, more in ((None, []), ("globex", ["--adapter", "globex"])):
        out = tmp_path / str(name)
        assert export(tmp_path / "learned", out, "--to", "vllm", *more, *target[:3]) == 0
        save_drafter(merge_adapter(started, name), tmp_path / "expected", "vllm")
        held, expected = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "expected"))
        assert held.keys() == expected.keys()
        assert all(torch.equal(held[key].float(), expected[key].float()) for key in held)
        assert not (out / "adapters").exists()
    assert export(tmp_path / "learned", tmp_path / "no", "--to", "vllm", "--adapter", "initech", *target[:3]) == 2
    assert f"--adapter initech: {tmp_path / 'learned'} holds acme, globex\n" in capsys.readouterr().err


def test_what_is_missing_is_what_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    for command, missing in (["drafter", "inspect"], "drafter"), (["keys"], "folder"):
        with pytest.raises(SystemExit):
            cli.main(command)
        assert capsys.readouterr().err.lower().endswith(f"the following arguments are required: {missing}\n")
