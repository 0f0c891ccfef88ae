"""``aurora-rl drafter init | export | inspect``: folders of drafters."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from aurora_rl.cli import assembly
from aurora_rl.cli.arguments import add_config_arguments, pair_of
from aurora_rl.cli.config import Config
from aurora_rl.cli.errors import ConfigError, naming
from aurora_rl.cli.signals import Stop
from aurora_rl.cli.spec import RunSpec, resolve
from aurora_rl.policies import Drafter, Eagle3Drafter, get_drafter
from aurora_rl.policies.adapters import merge_adapter
from aurora_rl.policies.formats.files import TRAINED_FOR, check_format, drafter_class, holds_drafter, local_folder
from aurora_rl.policies.formats.llama_cpp import holds_gguf, save_gguf
from aurora_rl.policies.formats.peft import adapter_ranks, read_adapters
from aurora_rl.policies.formats.vllm import LAYER_IDS
from aurora_rl.policies.model_card import engine_commands
from aurora_rl.storage import CheckpointError, is_working_directory, read_folder

_FORMATS = "sglang, vllm, hf (its authors' own), or another of its formats"
_GGUF = "gguf"


def register(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    commands = parser.add_subparsers(dest="what", required=True)

    text = "write an untrained drafter for a target, which serve and the engines load"
    init = commands.add_parser("init", help=text, description=text)
    _add_out(init)
    init.add_argument("--to", help=f"{_FORMATS}; vllm by default if the drafter has it, else its first")
    add_config_arguments(init, "drafter.name=eagle3 traffic.path=chats.jsonl, whose tokens the drafter knows")

    text = "write a drafter as an engine loads it"
    export = commands.add_parser("export", help=text, description=text)
    export.add_argument("--drafter", required=True, help="folder such as RUN_DIR/drafter, or hub id")
    _add_out(export, f"; with --to {_GGUF} a file")
    export.add_argument("--to", required=True, help=f"{_FORMATS}; {_GGUF} for llama.cpp")
    export.add_argument(
        "--target-gguf", type=Path, help=f"with --to {_GGUF}, the target's own file, whose vocabulary the drafter's has"
    )
    export.add_argument("--adapter", help="adapter to merge into the drafter; without it the shared drafter is written")
    export.add_argument("--from", dest="format", help="format of what is read; the one of run folders by default")
    add_config_arguments(export, "model=..., the target")

    text = "print what a drafter's folder holds and which engines load it"
    inspect = commands.add_parser("inspect", help=text, description=text)
    inspect.add_argument("drafter", help="folder such as RUN_DIR/drafter, or hub id")
    add_config_arguments(inspect, "model=..., the target that it is checked against")


def _add_out(parser: argparse.ArgumentParser, more: str = "") -> None:
    parser.add_argument("--out", type=Path, required=True, help=f"folder to write, new or empty{more}")
    parser.add_argument("--overwrite", action="store_true", help="replace the drafter that --out holds")


def run(config: Config, arguments: argparse.Namespace, stop: Stop) -> int:
    """Run one of the three. Returns the exit status."""
    if arguments.what == "inspect":
        named = arguments.config is not None or any(pair.startswith("model=") for pair in arguments.overrides)
        return _inspect(config, arguments.drafter, named)
    if is_working_directory(arguments.out):
        raise ConfigError(f"--out {arguments.out} is the working directory; name a folder in it")
    if (holds_drafter(arguments.out) or holds_gguf(arguments.out)) and not arguments.overwrite:
        raise ConfigError(f"--out {arguments.out} holds a drafter already; name another folder, or add --overwrite")
    if arguments.what == "init":
        if config.drafter.path is not None and (pair := pair_of("drafter.path", arguments.overrides)):
            raise ConfigError(
                f"{pair}: drafter init starts an untrained drafter; leave the key out, or write that drafter by "
                f"aurora-rl drafter export --drafter {config.drafter.path}"
            )
        return _init(config, arguments.out, arguments.to)
    return _export(config, arguments)


def _init(config: Config, out: Path, format: str | None) -> int:
    spec = resolve(replace(config, drafter=replace(config.drafter, path=None)))
    if not spec.drafter_class.formats:
        raise ConfigError(
            f"drafter.name={spec.drafter_name} has no weights to write; serve it by its name, or start another, "
            "such as drafter.name=eagle3"
        )
    if format is not None:
        with naming(f"--to {format}"):  # now, not after the target was loaded
            check_format(spec.drafter_class, format)
    prompts = assembly.traffic(config)[: assembly.VOCAB_PROMPTS]
    target = assembly.load(spec)
    drafter = assembly.start_drafter(spec, target, assembly.encoded_prompts(target, prompts))
    format = format or ("vllm" if "vllm" in drafter.formats else next(iter(drafter.formats), None))
    drafter.to(spec.dtype).save_pretrained(out.resolve(), format=format)
    print(f"{type(drafter).__name__} for {config.model}, untrained, written to {out} ({format})")
    return 0


def _export(config: Config, arguments: argparse.Namespace) -> int:
    if (arguments.to == _GGUF) != (arguments.target_gguf is not None):
        raise ConfigError(
            f"--to {arguments.to} --target-gguf {arguments.target_gguf}: a GGUF file takes the "
            f"vocabulary of the target's, and no other format does; give both --to {_GGUF} "
            "and --target-gguf TARGET.gguf, or neither"
        )
    kind = _kind(config, arguments.drafter)
    if arguments.to != _GGUF and arguments.to not in kind.formats:  # now, not after the target was loaded
        formats = ", ".join((*kind.formats, *((_GGUF,) if issubclass(kind, Eagle3Drafter) else ())))
        raise ConfigError(f"--to {arguments.to}: {kind.__name__} has no format {arguments.to!r}; it has {formats}")
    # Sizes and positions are checked against the target, and written as the target has them.
    spec = _resolve(config, arguments.drafter)
    drafter = assembly.load_checkpoint(spec, assembly.load_alone(spec), arguments.format)
    if (name := arguments.adapter) is not None:
        folder = local_folder(arguments.drafter)
        ranks = adapter_ranks(folder)
        if name not in ranks:
            raise ConfigError(f"--adapter {name}: {arguments.drafter} holds {', '.join(ranks) or 'no adapters'}")
        read_adapters(drafter, folder, [name], ranks[name])
    drafter = merge_adapter(drafter, name).to(spec.dtype)
    if arguments.to == _GGUF:
        save_gguf(drafter, arguments.out.resolve(), arguments.target_gguf)
    else:
        drafter.save_pretrained(arguments.out.resolve(), format=arguments.to)
    print(f"{type(drafter).__name__} for {config.model} written to {arguments.out} ({arguments.to})")
    return 0


def _inspect(config: Config, source: str, check: bool) -> int:
    folder = local_folder(source)
    tensors, entries = read_folder(folder, "config.json")
    kind = _kind(config, source)
    if type(entries.get("vocab_size")) is not int:
        raise CheckpointError(
            f"{folder}: config.json: vocab_size must be an integer, got {entries.get('vocab_size')!r}"
        )
    commands = engine_commands(kind, entries, source, config.model if check else "TARGET")
    trained_for = entries.get(TRAINED_FOR)
    ranks = adapter_ranks(folder)
    weights = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights}))
    lines = {
        "architecture": f"{kind.__name__} ({', '.join(entries['architectures'])})",
        "format": _format(kind, entries, commands),
        "trained for": f"target weights {trained_for}" if trained_for else "not stated",
        "vocabulary": f"{_rows(tensors, entries):,} of {entries['vocab_size']:,} tokens",
        "feature layers": _feature_layers(entries),
        "parameters": f"{sum(tensor.numel() for tensor in weights):,} in {dtypes}",
        "size": f"{sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()) / 2**20:.1f} MiB",
        **({"adapters": ", ".join(f"{name} (rank {rank})" for name, rank in ranks.items())} if ranks else {}),
        **{f"engine {name}": command for name, command in commands.items()},
    }
    fits = True
    if check:
        spec = _resolve(config, source)
        parts = assembly.load_alone(spec)
        try:
            assembly.load_checkpoint(spec, parts)
            lines["target"] = f"{config.model}: fits"
        except CheckpointError as error:
            fits = False
            lines["target"] = f"{config.model}: does not fit: {error}"
    for name, value in lines.items():
        print(f"{name:<18}{value}")
    return 0 if fits else 1


def _kind(config: Config, source: str) -> type[Drafter]:
    """Return the class of a drafter's folder. One that is imported is named by the user; a file may not do that."""
    name = config.drafter.name
    with naming("drafter.name"):
        asked = None if name is None else get_drafter(name)
    found = drafter_class(source, asked)
    if asked not in (None, found):
        raise ConfigError(f"drafter.name={name}: {source} holds a drafter of {found.__name__}; leave the key out")
    return found


def _resolve(config: Config, source: str) -> RunSpec:
    """Resolve the configuration for the drafter in a folder, whose class has the options."""
    return resolve(replace(config, drafter=replace(config.drafter, path=source)))


def _format(kind: type[Drafter], entries: Mapping[str, Any], commands: Mapping[str, str]) -> str:
    """Return the formats of the folder: those of engines that load it, otherwise the one that no engine loads."""
    engines = [name for name in ("sglang", "vllm") if name in commands]
    if engines:
        return ", ".join(engines)
    if "eagle_config" in entries:
        return "sglang; no engine loads a drafter that reads layer 0"
    return next(n for n in kind.formats if n not in ("sglang", "vllm"))


def _rows(tensors: Mapping[str, Tensor], entries: Mapping[str, Any]) -> int:
    """Return the number of rows of the draft head."""
    maps = (tensors[name] for name in ("d2t", "draft_id_to_target_id", "token_map") if name in tensors)
    found = next(maps, entries.get("aurora_rl_draft_vocab"))
    return int(entries.get("draft_vocab_size") or entries["vocab_size"]) if found is None else len(found)


def _feature_layers(entries: Mapping[str, Any]) -> str:
    """Return the target's layers by this library's ids: the layer that a state enters."""
    entered = entries.get("feature_layers") or entries.get(LAYER_IDS) or []
    for part, name in (("eagle_config", LAYER_IDS), ("dflash_config", "target_layer_ids")):
        left = (entries.get(part) or {}).get(name) or []
        entered = entered or [layer + 1 for layer in left]
    return ", ".join(map(str, entered)) or "not stated: the architecture's own"
