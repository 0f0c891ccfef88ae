"""The Python block of docs/vllm.md (all of envs/vllm) runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import DOCS, blocks, run_block

from aurora_rl.envs.vllm import VLLMClient

(BLOCK,) = blocks(DOCS / "vllm.md", "python")


def test_everything_up_to_the_launch(vllm_models: Path, tmp_path: Path) -> None:
    before, after = BLOCK.split("engine = ")
    assert after.startswith("VLLMClient.launch(")
    names = run_block(before, tmp_path, MODEL=vllm_models / "target", DRAFTER=vllm_models / "for_vllm")
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
    names = run_block(code, tmp_path, MODEL=vllm_models / "target", DRAFTER=vllm_models / "for_vllm")
    assert len(names["completion"].tokens) == 32 and int(names["trajectory"]["request"]) == 0
    printed = capsys.readouterr().out
    assert "'recorded': 1," in printed and "'version': 1," in printed and "'swaps': 1," in printed
    assert not server.status()["attached"]
