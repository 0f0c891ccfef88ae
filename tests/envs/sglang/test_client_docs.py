"""The Python block of docs/sglang.md (all of envs/sglang) runs as printed; test_client_attach.py has the commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import DOCS, blocks, run_block

from aurora_rl.envs.sglang import SGLangClient

(BLOCK,) = blocks(DOCS / "sglang.md", "python")


def test_everything_up_to_the_launch(sglang_models: Path, tmp_path: Path) -> None:
    before, after = BLOCK.split("engine = ")
    assert after.startswith("SGLangClient.launch(")
    names = run_block(before, tmp_path, MODEL=sglang_models / "target", DRAFTER=sglang_models / "eagle3")
    names["publisher"].close()
    names["collector"].shutdown()
    assert names["SGLangClient"] is SGLangClient


@pytest.mark.sglang
def test_the_whole_block_on_a_server(
    chain: SGLangClient, sglang_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # On the server that other tests share, since another takes a minute to start.
    attached = f"SGLangClient({chain.url!r}, {chain.plugin_address!r})"
    code, count = re.subn(r"SGLangClient\.launch\(.*?\)(?=\n)", attached, BLOCK)
    assert count == 1
    names = run_block(code, tmp_path, MODEL=sglang_models / "target", DRAFTER=sglang_models / "eagle3")
    assert len(names["completion"].tokens) == 32 and int(names["trajectory"]["request"]) == 0
    printed = capsys.readouterr().out
    assert "'recorded': 1," in printed and "'version': 1," in printed and "'swaps': 1," in printed
    assert not chain.status()["attached"]
