"""The pages of the documentation, and the commands on them."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FURTHER = [ROOT / "deploy" / "README.md", ROOT / "tests" / "sglang_cpu" / "README.md"]
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *FURTHER])
PAGES.remove(ROOT / "CHANGELOG.md")  # it names what was


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands(page: Path) -> list[list[str]]:
    """The words of every command of a page, without the environment before it."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [
        [*words[next(i for i, word in enumerate(words) if not re.match(r"[A-Z0-9_]+=", word)) :]]
        for words in lines
        if words
    ]


def run_block(code: str, folder: Path, **names: Path) -> dict:
    """Run a block with folders for the names in capitals, in float32 as the test's models are."""
    for name, path in names.items():
        code = code.replace(f'"{name}"', repr(str(path)))
    (folder / "block.py").write_text(code.replace("torch.bfloat16", "torch.float32"))
    return runpy.run_path(str(folder / "block.py"))
