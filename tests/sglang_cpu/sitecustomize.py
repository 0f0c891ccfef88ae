"""Lets SGLang be imported on a machine without CUDA; Python imports this by its name from a folder on PYTHONPATH.

Every process of a server runs it, helpers that never import SGLang included. So it imports nothing heavy itself and
acts just before the first import of what it repairs.
"""

import gc
import importlib.machinery
import importlib.util
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace


class _BeforeImport:
    """A finder that finds nothing, and calls a function once before a module of that name is looked for."""

    def __init__(self, name: str, act: Callable[[], None]) -> None:
        self.name, self.act = name, act

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == self.name:
            sys.meta_path.remove(self)
            self.act()


def _declare_torchvision_operators() -> None:
    """Declare the two operators that torchvision registers shapes for at import, whether it could load them or not.

    The x86 wheel on the Python index is built for CUDA. Next to a torch for CPU its library does not load, torchvision
    goes on without, and then fails with "operator torchvision::nms does not exist". SGLang and transformers need its
    import only, not the operators.
    """
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return  # not installed; the import that is going on says so
    try:
        for library in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(library)
    except OSError:
        for name in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)


def _install_triton_stub() -> None:
    """Where triton is absent, put SGLang's own stub in its place, which it installs by itself on Apple machines only.

    The stub makes kernels definable, not callable, and no kernel is called on a CPU. Two of its repairs are for Apple's
    device and are kept from taking effect: `torch.mps` and wrappers of every `Tensor.to` and `Tensor.copy_`.
    """
    if importlib.util.find_spec("triton") is not None:
        return
    from unittest import mock

    import torch

    sglang = importlib.machinery.PathFinder.find_spec("sglang")
    if sglang is None or sglang.origin is None:
        return  # not installed; the import that is going on says so
    # By its file, since importing it by name would import sglang, and with it triton, first.
    source = Path(sglang.origin).with_name("_platform_stubs.py")
    spec = importlib.util.spec_from_file_location("_sglang_platform_stubs", source)
    assert spec is not None and spec.loader is not None
    stubs = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stubs)
    with (
        mock.patch.object(sys, "platform", "darwin"),
        mock.patch.object(platform, "machine", lambda: "arm64"),
        mock.patch.object(torch.backends.mps, "is_available", lambda: True),
        mock.patch.object(torch, "mps", SimpleNamespace()),
        mock.patch.object(stubs, "_patch_non_blocking"),
    ):
        stubs.install_platform_stubs()


# Three processes of a server import a million objects each, which live to its end. To search them for garbage after
# every 700 new ones takes 0.7 s in each.
gc.set_threshold(50_000)
# `make install` keeps torchvision apart: on the ordinary path of a torch for CPU it would break every import of
# transformers, in processes too that have nothing to do with SGLang.
sys.path.append(str(Path(sys.prefix) / "for-sglang"))
sys.meta_path[:0] = [
    _BeforeImport("torchvision", _declare_torchvision_operators),
    _BeforeImport("sglang", _install_triton_stub),
]
