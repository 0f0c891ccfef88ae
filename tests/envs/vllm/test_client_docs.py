"""The Python block of docs/vllm.md (all of envs/vllm) runs as printed."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from aurora_rl.envs.vllm import VLLMClient

(BLOCK,) = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[3] / "docs" / "vllm.md").read_text(), re.DOTALL)


def run(code: str, folder: Path, **names: Path) -> dict:
    """Run a block with folders for the names in capitals, in float32 as the test's models are."""
    for name, path in names.items():
        code = code.replace(f'"{name}"', repr(str(path)))
    (folder / "block.py").write_text(code.replace("torch.bfloat16", "torch.float32"))
    return runpy.run_path(str(folder / "block.py"))


def test_everything_up_to_the_launch(vllm_models: Path, tmp_path: Path) -> None:
    before, after = BLOCK.split("engine = ")
    assert after.startswith("VLLMClient.launch(")
    names = run(before, tmp_path, MODEL=vllm_models / "target", DRAFTER=vllm_models / "for_vllm")
    names["publisher"].close()
    names["collector"].shutdown()
    assert names["VLLMClient"] is VLLMClient


@pytest.mark.vllm
def test_the_whole_block_on_a_server(
    server: VLLMClient, vllm_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # On the server that other tests share, since another takes half a minute to start.
    attached = f"VLLMClient({server.url!r}, {server.plugin_address!r})"
    code, count = re.subn(r"VLLMClient\.launch\(.*?\)(?=\n)", attached, BLOCK)
    assert count == 1
    names = run(code, tmp_path, MODEL=vllm_models / "target", DRAFTER=vllm_models / "for_vllm")
    assert len(names["completion"].tokens) == 32 and int(names["trajectory"]["request"]) == 0
    printed = capsys.readouterr().out
    assert "'recorded': 1," in printed and "'version': 1," in printed and "'swaps': 1," in printed
    assert not server.status()["attached"]
