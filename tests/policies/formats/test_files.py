"""Drafter checkpoints: what is written is what engines read, and what is read drafts as it did."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from drafters import edit_config, edit_tensors
from safetensors.torch import load_file, save_file
from tensordict import TensorDict

from aurora_rl.collectors.dataset import TrajectoryDataset
from aurora_rl.envs.sglang.client import drafter_arguments
from aurora_rl.models.loading import ModelError, load_target
from aurora_rl.policies import (
    Drafter,
    Eagle3Drafter,
    EagleDrafter,
    MedusaDrafter,
    NgramDrafter,
    TargetParts,
    get_drafter,
)
from aurora_rl.policies.formats.files import holds_drafter, load_drafter, naming_drafters, save_drafter
from aurora_rl.storage import CheckpointError
from aurora_rl.testing import tiny_folder, tiny_target, tiny_trajectory
from aurora_rl.trajectories import pack


def test_what_is_read_scores_as_what_was_written(saved_eagle3: tuple[Eagle3Drafter, Path], parts: TargetParts) -> None:
    drafter, folder = saved_eagle3
    read = load_drafter(folder, parts)
    published = read.published()
    assert published.keys() == drafter.published().keys()
    assert all(torch.equal(published[name], tensor) for name, tensor in drafter.published().items())
    assert read.feature_layers == drafter.feature_layers
    batch = pack([tiny_trajectory(drafter)])
    assert torch.equal(read.score(batch), drafter.score(batch))


def test_lower_precision_is_read_in_float32(parts: TargetParts, tmp_path: Path) -> None:
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(4)).bfloat16()
    save_drafter(drafter, tmp_path / "drafter")
    assert json.loads((tmp_path / "drafter" / "config.json").read_text())["dtype"] == "bfloat16"
    read = load_drafter(str(tmp_path / "drafter"), parts)
    assert read.fc.weight.dtype == torch.float32
    assert torch.equal(read.fc.weight, drafter.fc.weight.float())


@pytest.mark.parametrize("name", ["d2t", "norm.weight", "midlayer.self_attn.q_proj.weight"])
def test_a_missing_tensor_is_named(saved_eagle3: tuple[Eagle3Drafter, Path], parts: TargetParts, name: str) -> None:
    tensors = load_file(saved_eagle3[1] / "model.safetensors")
    del tensors[name]
    save_file(tensors, saved_eagle3[1] / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"'{name}'.* is missing"):
        load_drafter(saved_eagle3[1], parts)


def test_an_unknown_tensor_is_named(saved_eagle3: tuple[Eagle3Drafter, Path], parts: TargetParts) -> None:
    tensors = load_file(saved_eagle3[1] / "model.safetensors")
    save_file({**tensors, "midlayer.self_attn.q_norm.weight": torch.ones(4)}, saved_eagle3[1] / "model.safetensors")
    with pytest.raises(CheckpointError, match="'midlayer.self_attn.q_norm.weight' is unknown"):
        load_drafter(saved_eagle3[1], parts)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_broken_and_missing_files_are_named(
    saved_eagle3: tuple[Eagle3Drafter, Path], parts: TargetParts, name: str
) -> None:
    (saved_eagle3[1] / name).write_text("{")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_drafter(saved_eagle3[1], parts)
    (saved_eagle3[1] / name).unlink()
    with pytest.raises(CheckpointError, match="give a folder with model.safetensors and config.json"):
        load_drafter(saved_eagle3[1], parts)


def test_a_pickle_of_anything_but_tensors_is_refused(
    saved_eagle3: tuple[Eagle3Drafter, Path], parts: TargetParts
) -> None:
    folder = saved_eagle3[1]
    (folder / "model.safetensors").unlink()
    torch.save({"fc.weight": Path("/")}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_drafter(folder, parts)


@pytest.mark.parametrize("name", ["eagle3", "eagle", "medusa", "dflash"])
def test_a_map_that_does_not_rise_is_neither_written_nor_read_nor_swapped_in(
    parts: TargetParts, tmp_path: Path, name: str
) -> None:
    kind, message = get_drafter(name), "is not rising: row 1 is token 11, row 2 token 7"
    rising, falling = torch.tensor([2, 7, 11, 30]), torch.tensor([2, 11, 7, 30])
    with pytest.raises(CheckpointError, match=message):
        save_drafter(kind.from_target(parts, draft_vocab=falling), tmp_path / "never")
    drafter = kind.from_target(parts, draft_vocab=rising)
    with pytest.raises(ValueError, match=message):
        drafter.install({**drafter.published(), "d2t": falling - torch.arange(4)})
    assert torch.equal(drafter.draft_vocab, rising)
    save_drafter(drafter, tmp_path / "drafter")
    edit_tensors(tmp_path / "drafter", d2t=falling - torch.arange(4))
    with pytest.raises(CheckpointError, match=message):
        load_drafter(tmp_path / "drafter", parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.to(torch.float8_e4m3fn), "'norm.weight' is torch.float8_e4m3fn, quantized without a scale"),
        (lambda t: t.to(torch.int8), "'norm.weight' is torch.int8, this drafter needs floating-point numbers"),
        (lambda t: t / 0, "'norm.weight' holds values that are not finite"),
        (lambda t: t * torch.nan, "'norm.weight' holds values that are not finite"),
    ],
)
def test_tensors_that_hold_no_weights_are_named(
    saved_eagle3: tuple[Eagle3Drafter, Path],
    parts: TargetParts,
    change: Callable[[torch.Tensor], torch.Tensor],
    message: str,
) -> None:
    folder = saved_eagle3[1]
    edit_tensors(folder, **{"norm.weight": change(load_file(folder / "model.safetensors")["norm.weight"])})
    with pytest.raises(CheckpointError, match=message):
        load_drafter(folder, parts)


class OtherHeads(MedusaDrafter):
    """A drafter that has no name, only its import path."""


@pytest.mark.parametrize("make", [MedusaDrafter, OtherHeads])
def test_other_architectures_come_back_from_their_folder(
    parts: TargetParts, tmp_path: Path, make: type[Drafter]
) -> None:
    drafter = make.from_target(parts, draft_vocab=torch.arange(0, 32, 3))
    save_drafter(drafter, tmp_path / "drafter")
    read = load_drafter(tmp_path / "drafter", parts, make)
    batch = pack([tiny_trajectory(drafter)])
    assert type(read) is make and torch.equal(read.score(batch), drafter.score(batch))


def test_a_folder_of_a_drafter_without_a_name_is_of_its_class(parts: TargetParts, tmp_path: Path) -> None:
    save_drafter(OtherHeads.from_target(parts, draft_vocab=torch.arange(8)), tmp_path / "drafter")
    assert type(load_drafter(tmp_path / "drafter", parts)) is OtherHeads
    edit_config(tmp_path / "drafter", aurora_rl_drafter=None)  # as it was written before it had the entry
    with pytest.raises(
        CheckpointError,
        match=r"\['OtherHeads'\]; there are .* set drafter.name=package.module:Class, or in Python",
    ):
        load_drafter(tmp_path / "drafter", parts)
    save_drafter(Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(8)), tmp_path / "drafter")
    with pytest.raises(CheckpointError, match="config.json is of Eagle3Drafter, and OtherHeads is asked for"):
        load_drafter(tmp_path / "drafter", parts, OtherHeads)


class OtherEagle(EagleDrafter):
    """One whose files may be as EAGLE's authors have them, which have no entry of ours."""


@pytest.mark.parametrize("format", OtherEagle.formats)
def test_a_drafter_without_a_name_comes_back_from_each_format(parts: TargetParts, tmp_path: Path, format: str) -> None:
    save_drafter(OtherEagle.from_target(parts, draft_vocab=torch.arange(8)), tmp_path / "drafter", format)
    assert type(load_drafter(tmp_path / "drafter", parts, OtherEagle, format=format)) is OtherEagle


def test_a_broken_language_model_is_not_taken_for_a_drafter(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no file named model\.safetensors"), naming_drafters(folder):
        load_target(folder, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("eagle3", {"norm_output": True}),
        ("eagle3", {"fc_norm": True}),
        ("medusa", {"num_heads": 6}),
        ("dflash", {"block_size": 4, "mask_token_id": None}),
        ("standalone", {"num_layers": 3}),
    ],
)
def test_a_run_loads_what_it_started_with_by_the_same_options(
    parts: TargetParts, tmp_path: Path, name: str, options: dict
) -> None:
    """What the server of a flywheel saves, its learner reads."""
    drafter = get_drafter(name).from_target(parts, draft_vocab=torch.arange(8), **options)
    save_drafter(drafter, tmp_path / "drafter")
    read = load_drafter(tmp_path / "drafter", parts, type(drafter), options=options)
    assert read.options == drafter.options


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("eagle3", "num_target_layers is 3, the target has 5"),
        ("eagle", "num_target_layers is 3, the target has 5"),
        ("dflash", "num_target_layers is 3, the target has 5"),
        ("medusa", r"Medusa reads what the target's head reads, feature_layers=\(5,\), got \(3,\)"),
    ],
)
def test_a_drafter_of_a_target_of_other_layers_is_refused(
    parts: TargetParts, tmp_path: Path, name: str, message: str
) -> None:
    save_drafter(get_drafter(name).from_target(parts, draft_vocab=torch.arange(8)), tmp_path / "drafter")
    deeper = TargetParts.of(tiny_target(num_layers=5, dtype=torch.float32))
    with pytest.raises(CheckpointError, match=message):
        load_drafter(tmp_path / "drafter", deeper)


def test_a_standalone_drafter_serves_targets_of_any_depth(parts: TargetParts, tmp_path: Path) -> None:
    save_drafter(get_drafter("standalone").from_target(parts, draft_vocab=torch.arange(8)), tmp_path / "drafter")
    load_drafter(tmp_path / "drafter", TargetParts.of(tiny_target(num_layers=5, dtype=torch.float32)))


def test_a_standalone_drafter_of_one_layer_is_no_eagle(parts: TargetParts, tmp_path: Path) -> None:
    drafter = get_drafter("standalone").from_target(parts, draft_vocab=torch.arange(8), num_layers=1)
    save_drafter(drafter, tmp_path / "drafter")
    assert type(load_drafter(tmp_path / "drafter", parts)) is type(drafter)
    with pytest.raises(CheckpointError, match="config.json is of StandaloneDrafter, and EagleDrafter is asked for"):
        load_drafter(tmp_path / "drafter", parts, get_drafter("eagle"))


def test_layers_that_the_target_lacks_are_named(saved_eagle3: tuple[Eagle3Drafter, Path], parts: TargetParts) -> None:
    edit_config(saved_eagle3[1], eagle_config={"eagle_aux_hidden_state_layer_ids": [40, 41]})
    with pytest.raises(CheckpointError, match=r"reads what enters layer 41, and the target has 0\.\.3"):
        load_drafter(saved_eagle3[1], parts)


def test_what_sglang_cannot_read_is_kept_but_not_exported(parts: TargetParts, tmp_path: Path) -> None:
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(8))
    save_drafter(drafter, tmp_path / "run")
    assert load_drafter(tmp_path / "run", parts).feature_layers == drafter.feature_layers == (0, 1)
    message = r"reads layers \(0, 1\), and SGLang cannot read what enters layer 0; .* drafter.feature_layers=\[1,2\]"
    with pytest.raises(CheckpointError, match=message):
        save_drafter(drafter, tmp_path / "sglang", "sglang")
    assert not (tmp_path / "sglang").exists()
    save_drafter(drafter, tmp_path / "vllm", "vllm")  # which can
    with pytest.raises(CheckpointError, match="run: the drafter reads what enters layer 0, which SGLang cannot read"):
        drafter_arguments(tmp_path / "run", tmp_path / "token_map.pt")


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_have_the_mode_that_the_umask_says(
    parts: TargetParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    monkeypatch.chdir(tmp_path)
    before = os.umask(umask)
    try:
        drafter = MedusaDrafter.from_target(parts, draft_vocab=torch.arange(8))
        save_drafter(drafter, "drafter")  # a path may be a string
        TrajectoryDataset("stream").append(TensorDict({"request": torch.tensor(1)}))
    finally:
        os.umask(before)
    files = [*Path("drafter").iterdir(), *Path("stream").iterdir()]
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == dict.fromkeys(
        ("config.json", "model.safetensors", "000000.safetensors"), 0o666 & ~umask
    )
    assert type(load_drafter("drafter", parts)) is MedusaDrafter


def test_an_option_that_differs_is_named(parts: TargetParts, tmp_path: Path) -> None:
    save_drafter(MedusaDrafter.from_target(parts, draft_vocab=torch.arange(8)), tmp_path / "drafter")
    with pytest.raises(CheckpointError, match="option num_heads is 4 there, 6 is asked for"):
        load_drafter(tmp_path / "drafter", parts, options={"num_heads": 6, "num_layers": 1})


def test_a_layout_that_cannot_hold_the_drafter_is_named(parts: TargetParts, tmp_path: Path) -> None:
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(8), feature_layers=(0, 2))
    with pytest.raises(CheckpointError, match="Eagle3Drafter has no format 'gguf'; it has sglang, vllm, hf"):
        save_drafter(drafter, tmp_path / "drafter", "gguf")
    with pytest.raises(CheckpointError, match=r"reads layers \(0, 2\), and files in 'hf' are of \(0, 1\)"):
        save_drafter(drafter, tmp_path / "drafter", "hf")
    with pytest.raises(CheckpointError, match="NgramDrafter has no formats and is not saved; serve it by its name$"):
        save_drafter(NgramDrafter(32), tmp_path / "drafter")
    assert not (tmp_path / "drafter").exists()


def test_only_a_drafter_is_replaced(saved_eagle3: tuple[Eagle3Drafter, Path], tmp_path: Path) -> None:
    drafter, folder = saved_eagle3
    (tmp_path / "precious").mkdir()
    save_drafter(drafter, tmp_path / "precious")  # empty
    save_drafter(drafter, folder)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "config.json").write_text("mine")
    with pytest.raises(CheckpointError, match="thesis holds other things than a drafter .*which would be lost"):
        save_drafter(drafter, tmp_path / "thesis")
    with pytest.raises(CheckpointError, match="config.json is a file; name a folder"):
        save_drafter(drafter, tmp_path / "thesis" / "config.json")
    assert (tmp_path / "thesis" / "config.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        ("eagle3", {"architectures": [3]}, r"architectures must be a list of str, got \[3\]"),
        ("eagle3", {"architectures": "LlamaForCausalLMEagle3"}, "architectures must be a list of str"),
        ("eagle3", {"eagle_config": "none"}, "eagle_config must be an object, got 'none'"),
        (
            "eagle3",
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": ["1", 2]}},
            "eagle_aux_hidden_state_layer_ids must be a list of int",
        ),
        ("dflash", {"dflash_config": "none"}, "dflash_config must be an object"),
        ("dflash", {"dflash_config": {"target_layer_ids": 1}}, "target_layer_ids must be a list of int, got 1"),
        ("medusa", {"options": None}, "lacks an entry, or has one of another type: TypeError"),
        ("medusa", {"options": {"num_wings": 2}}, "lacks an entry, or has one of another type: .*num_wings"),
        ("medusa", {"options": {"num_heads": "4"}}, "lacks an entry, or has one of another type: TypeError"),
        ("medusa", {"feature_layers": None}, "lacks an entry, or has one of another type: TypeError"),
    ],
)
def test_malformed_entries_are_named(
    parts: TargetParts, tmp_path: Path, name: str, entries: dict, message: str
) -> None:
    save_drafter(get_drafter(name).from_target(parts, draft_vocab=torch.arange(8)), tmp_path / "drafter")
    edit_config(tmp_path / "drafter", **entries)
    with pytest.raises(CheckpointError, match=f"drafter: .*{message}"):
        load_drafter(tmp_path / "drafter", parts)


@pytest.mark.parametrize("document", ["[1]", "null", '"drafter"'])
def test_a_document_of_another_type_is_named(
    saved_eagle3: tuple[Eagle3Drafter, Path], parts: TargetParts, document: str
) -> None:
    (saved_eagle3[1] / "config.json").write_text(document)
    with pytest.raises(CheckpointError, match="config.json must hold an object"):
        load_drafter(saved_eagle3[1], parts)


@pytest.mark.parametrize(
    "offsets", [torch.zeros(4), torch.zeros(2, 2, dtype=torch.int64), torch.zeros(4, dtype=torch.bool), torch.zeros(0)]
)
def test_a_draft_map_of_another_type_is_named(
    saved_eagle3: tuple[Eagle3Drafter, Path], parts: TargetParts, offsets: torch.Tensor
) -> None:
    edit_tensors(saved_eagle3[1], d2t=offsets)
    with pytest.raises(CheckpointError, match="tensor 'd2t' must hold an integer for each row"):
        load_drafter(saved_eagle3[1], parts)


def test_a_folder_may_be_named_by_a_string(parts: TargetParts, tmp_path: Path) -> None:
    assert not holds_drafter(str(tmp_path))
    save_drafter(MedusaDrafter.from_target(parts, draft_vocab=torch.arange(16)), str(tmp_path / "drafter"))
    assert holds_drafter(str(tmp_path / "drafter")) and holds_drafter(tmp_path / "drafter")


def test_a_source_that_is_neither_a_folder_nor_on_the_hub_is_named(
    parts: TargetParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="nobody/nothing is neither a folder nor a repository of the hub"):
        load_drafter("nobody/nothing", parts)


def tuned(part: str) -> TargetParts:
    """Parts of the tiny target, further trained in one place."""
    model = tiny_target(dtype=torch.float32)
    model.get_parameter(part).add_(0.01 * torch.randn_like(model.get_parameter(part)))
    return TargetParts.of(model)


@pytest.mark.parametrize("part", ["lm_head.weight", "model.layers.2.mlp.up_proj.weight"])
@pytest.mark.parametrize("name", ["eagle3", "eagle", "medusa", "dflash", "standalone"])
def test_a_drafter_of_a_target_of_other_weights_is_refused_unless_asked_for(
    parts: TargetParts, tmp_path: Path, name: str, part: str
) -> None:
    drafter, tuned_target = get_drafter(name).from_target(parts, draft_vocab=torch.arange(8)), tuned(part)
    drafter.trained_for = parts.fingerprint
    for format in drafter.formats:
        if format == "sglang" and name == "dflash":
            continue  # whose default layers are too few in a tiny target
        folder = tmp_path / format
        # EAGLE-3's are those that a run keeps and SGLang cannot read.
        asked = None if (name, format) == ("eagle3", "sglang") else format
        save_drafter(drafter, folder, asked)
        wrong = (
            f"{folder}: config.json: aurora_rl_made_for is '{parts.fingerprint}', the target's weights are "
            f"'{tuned_target.fingerprint}': .* set drafter.trained_for=any"
        )
        with pytest.raises(CheckpointError, match=wrong):
            load_drafter(folder, tuned_target, type(drafter), format=format)
        assert load_drafter(folder, parts, type(drafter), format=format).trained_for == parts.fingerprint
        # From then on it is the other target's.
        read = load_drafter(folder, tuned_target, type(drafter), format=format, trained_for="any")
        save_drafter(read, tmp_path / "again", asked)
        load_drafter(tmp_path / "again", tuned_target, type(drafter), format=format)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_same_target_in_another_dtype_is_the_same(parts: TargetParts, tmp_path: Path, dtype: torch.dtype) -> None:
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(8))
    save_drafter(drafter, tmp_path / "drafter")
    load_drafter(tmp_path / "drafter", TargetParts.of(tiny_target(dtype=dtype)))


def test_a_folder_that_names_no_target_is_read_and_named_when_saved(
    saved_eagle3: tuple[Eagle3Drafter, Path], tmp_path: Path
) -> None:
    tuned_target = tuned("lm_head.weight")
    entries = json.loads((saved_eagle3[1] / "config.json").read_text())
    del entries["aurora_rl_made_for"]
    (saved_eagle3[1] / "config.json").write_text(json.dumps(entries))
    save_drafter(load_drafter(saved_eagle3[1], tuned_target), tmp_path / "again")
    assert (
        json.loads((tmp_path / "again" / "config.json").read_text())["aurora_rl_made_for"] == tuned_target.fingerprint
    )
