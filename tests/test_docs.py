"""What the pages say holds: code blocks run, what they name exists, and generated pages are current."""

from __future__ import annotations

import ast
import importlib
import json
import re
import runpy
import shlex
import tomllib
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import DOCS, PAGES, ROOT, blocks, commands, page_name, pages_with

from aurora_rl.adaptation.scenario import read_scenario
from aurora_rl.cli import spec
from aurora_rl.cli.config import Config, load_config
from aurora_rl.cli.config.canary import compared
from aurora_rl.cli.main import COMMANDS, main
from aurora_rl.envs.engine import ENGINES
from aurora_rl.envs.verification.rules import RULES
from aurora_rl.objectives import registry
from aurora_rl.objectives.divergences import DIVERGENCES
from aurora_rl.policies import MedusaDrafter, TargetParts
from aurora_rl.policies.formats.files import load_drafter, save_drafter
from aurora_rl.policies.registry import DRAFTERS
from aurora_rl.remote_engines import REMOTE_ENGINES
from aurora_rl.serving.http.bodies import draft_metrics
from aurora_rl.serving.http.schemas import ChatCompletionBody, parse
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.testing import tiny_target
from aurora_rl.workload.request_fields import HARMLESS, NEUTRAL
from aurora_rl.workload.traffic import read_jsonl

GENERATED = runpy.run_path(str(DOCS / "generate.py"))["PAGES"]


def prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def test_every_block_is_of_a_language_that_a_test_reads() -> None:
    languages = {
        language for page in PAGES for language in re.findall(r"^```(\w*)\n.*?^```", page.read_text(), re.M | re.S)
    }
    assert languages == {"python", "yaml", "bash", "toml", "json", "text", "mermaid"}


# The others need a server: tests/envs/sglang/test_client_docs.py, that of vllm, and tests/serving/http/test_front.py.
SERVED = (ROOT / "README.md", *(DOCS / f"{name}.md" for name in ("sglang", "vllm", "serving")))
EXECUTED = [p for p in pages_with("python") if p not in SERVED]


@pytest.mark.parametrize("page", EXECUTED, ids=page_name)
def test_python_blocks_run(page: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run in their order, in one namespace, with a tiny model in place of the embedded one.

    But for a client of a server, which tests/faults/test_serve.py runs.
    """
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page.stem}
    for block in blocks(page, "python"):
        if "http://127.0.0.1:8000" in block:
            continue
        exec(compile(block.replace('"smollm2"', repr(str(tiny_folder))), page_name(page), "exec"), namespace)


@pytest.mark.smollm2
@pytest.mark.usefixtures("smollm2_path")
def test_the_readme_s_example_prints_clean_text(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("aurora_rl.llm")
    (block,) = blocks(ROOT / "README.md", "python")
    # In float32, where the page's figure does not depend on how a CPU rounds.
    assert block.count('drafter="eagle3"') == 1
    block = block.replace('drafter="eagle3"', 'drafter="eagle3", dtype="float32"')
    exec(compile(block, "README.md", "exec"), {})
    out = capsys.readouterr().out
    *text, acceptance_length = out.split()
    assert len(text) > 5 and "<|" not in out
    assert f"an acceptance length of {float(acceptance_length):.2f} tokens a round" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", pages_with("yaml"), ids=page_name)
def test_yaml_blocks_are_configurations_or_scenarios(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        (tmp_path / "run.yaml").write_text(block)
        if page.stem == "adaptation":
            assert read_scenario(tmp_path / "run.yaml").arms
        else:
            check(load_config(tmp_path / "run.yaml"))


@pytest.mark.parametrize("page", pages_with("toml"), ids=page_name)
def test_toml_blocks_are_entry_points(page: Path) -> None:
    """Of groups that a registry reads, each `name = "package.module:Thing"`."""
    for block in blocks(page, "toml"):
        content = tomllib.loads(block)
        assert content.keys() == {"project"} and content["project"].keys() == {"entry-points"}
        for group, entries in content["project"]["entry-points"].items():
            assert group in GROUPS
            assert all(re.fullmatch(r"[\w.]+:\w+", entry) for entry in entries.values())


GROUPS = {parts._group for parts in (DIVERGENCES, DRAFTERS, ENGINES, registry.OBJECTIVES, RULES)}


@pytest.mark.parametrize("page", pages_with("json"), ids=page_name)
def test_json_lines_are_requests(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "json"):
        (tmp_path / "traffic.jsonl").write_text(block)
        assert len(read_jsonl(tmp_path / "traffic.jsonl")) == len(block.splitlines())


def test_docstrings_are_read_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """`make docs` takes a warning for an error; it reads them by griffe, too."""
    griffe = pytest.importorskip("griffe", reason="griffelib is not installed; `make install` brings it")

    def parse(part: Any) -> None:
        for member in part.members.values():
            if not member.is_alias:
                if member.docstring is not None:
                    member.docstring.parse("google")
                parse(member)

    extensions = griffe.load_extensions(DOCS / "docstrings.py")
    for package in ("aurora_rl", "aurora_kernels"):
        parse(griffe.load(package, search_paths=[ROOT, ROOT / "kernels"], extensions=extensions))
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []


API = re.findall(r"^::: (.+)$", (DOCS / "reference" / "api.md").read_text(), re.M)


@pytest.mark.parametrize("page", pages_with("python"), ids=page_name)
def test_what_pages_import_is_on_the_api_page(page: Path) -> None:
    modules = [importlib.import_module(module) for module in API]
    for node in ast.walk(ast.parse("\n".join(blocks(page, "python")))):
        if isinstance(node, ast.ImportFrom) and node.module == "aurora_rl":
            public = [alias.name for alias in node.names]
            assert all(any(alias in vars(module) for module in modules) for alias in public), public
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("aurora_rl."):
            assert node.module in API


def test_every_public_name_is_documented_on_the_api_page() -> None:
    """What is in an `__all__`, and the methods of its classes: inherited ones under some class of the page."""
    griffe = pytest.importorskip("griffe", reason="griffelib is not installed; `make install` brings it")
    package = griffe.load("aurora_rl", search_paths=[ROOT])
    shown = {package[module.removeprefix("aurora_rl.")] for module in API if module.startswith("aurora_rl.")}
    roots = [module for module in (package, *shown) if module.exports is not None]
    exported = {f"{root.path}.{name}": _target(root[name]) for root in roots for name in root.exports}
    del exported["aurora_rl.__version__"]
    on_page = {part for module in shown for part in map(_target, _public(module)) if part.docstring is not None}
    methods = {method.name for part in on_page if part.is_class for method in _public(part) if method.docstring}
    missing = {name for name, part in exported.items() if part not in on_page}
    for name, part in exported.items():
        if part.is_class:
            inherited = [method for method in part.inherited_members.values() if method.is_function]
            missing |= {f"{name}.{method.name}" for method in inherited if method.is_public} - {
                f"{name}.{method}" for method in methods
            }
    assert missing == set()


def _public(part: Any) -> list[Any]:
    return [member for member in part.members.values() if member.is_public and not member.is_module]


def _target(part: Any) -> Any:
    """The object itself; a function that has the name of its module is taken for the module."""
    return part.final_target if part.is_alias else part[part.name] if part.is_module else part


def check(config: Config) -> None:
    """Refuse names that do not exist; a reader's own package and folder of a drafter pass."""
    if "my_package." not in str(config):
        for each in compared(config):
            spec.resolve(replace(each, drafter=replace(each.drafter, path=None)))


def check_aurora_rl(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if words[0] == "history":  # it takes no configuration, and is run below
        return
    if words[0] == "keys":  # nor does this
        assert main(["keys", str(tmp_path / words[1]), *words[2:]]) == 0
        capsys.readouterr()  # what is read below is the next command's
        return
    for place, word in enumerate(words):
        if word.endswith("/config.yaml") or word in ("run.yaml", "fleet.yaml"):
            words[place] = str(tmp_path / word)
            (tmp_path / word).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / word).touch()
    code = main([*words, "--print-config"])
    printed = capsys.readouterr()
    assert code == 0, f"{words}: {printed.err}"
    (tmp_path / "printed.yaml").write_text(printed.out)
    config = load_config(tmp_path / "printed.yaml")
    if words[0] in REMOTE_ENGINES:  # the command names the engine, and the drafter's folder its architecture
        drafter = replace(config.drafter, name=config.drafter.name or "eagle3")
        config = replace(config, engine=replace(config.engine, name=words[0]), drafter=drafter)
    check(config)


def check_script(words: list[str]) -> None:
    script = ROOT / words[0]
    sources = script.read_text() + (script.parent / "common.py").read_text()
    options = [word for word in words[1:] if word.startswith("--")]
    assert all(f'"{option}"' in sources for option in options), words
    check(load_config(overrides=[word for word in words[1:] if re.match(r"[a-z_.]+=", word)]))


@pytest.mark.parametrize("page", pages_with("bash"), ids=page_name)
def test_commands_exist_and_their_keys_do(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets = re.findall(r"^([\w-]+):.*## ", (ROOT / "Makefile").read_text(), re.M)
    for words in commands(page):
        program, *rest = words
        if program.removeprefix(".venv/bin/") == "aurora-rl":
            check_aurora_rl(rest, tmp_path, capsys)
        elif program == "make":
            assert rest[0] in targets
            check(
                load_config(overrides=[pair for word in rest[1:] for pair in shlex.split(word.removeprefix("ARGS="))])
            )
        elif program == "torchrun" and "-m" in rest:  # what it starts
            check_aurora_rl(rest[rest.index("aurora_rl.cli.main") + 1 :], tmp_path, capsys)
        elif program == "torchrun":
            check_script(rest[next(i for i, word in enumerate(rest) if word.endswith(".py")) :])
        elif program == "python" and rest[0] == "-m":
            assert rest[1] == "sglang.launch_server" or find_spec(rest[1]) is not None
        elif program == "python":
            check_script(rest)
        elif program == "curl":  # tests/serving/http asks the server such things
            assert rest[0] == "http://127.0.0.1:8000/v1/chat/completions"
            parse(rest[rest.index("-d") + 1].encode(), ChatCompletionBody)
        else:
            assert program in ("vllm", "aiperf", "llama-server")  # in environments of their own


def test_the_history_of_the_reliability_page_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`aurora-rl history` prints the command that serves a kept version, whose files load."""
    (history, serve) = commands(DOCS / "reliability.md")[-2:]
    run = tmp_path / history[-1]
    save_drafter(
        MedusaDrafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16)), run / "versions" / "7"
    )
    MetricsLog(run / "metrics.jsonl", "server").write("swap", version=7, ms=2.5, requests=8)
    (run / "config.yaml").write_text("engine: {slots: 3}\n")
    monkeypatch.chdir(tmp_path)
    assert main(history[1:]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1] == shlex.join(serve)
    config = load_config(serve[3], serve[4:])
    assert config.engine.slots == 3 and config.drafter.path is not None
    load_drafter(config.drafter.path, TargetParts.of(tiny_target()))


SECTIONS = "|".join(key for key, value in vars(Config()).items() if hasattr(value, "__dataclass_fields__"))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_keys_in_the_text_exist(page: Path) -> None:
    known = {f"{section}.{key}" for section in SECTIONS.split("|") for key in vars(getattr(Config(), section))}
    found = re.findall(rf"(?<![\w.])((?:{SECTIONS})\.\w+)(?![\w.(])", " ".join(re.findall(r"`([^`]+)`", prose(page))))
    assert {key for key in found if not key.endswith(FILES)} <= known | METHODS


FILES = (".py", ".sh", ".md", ".log", ".json", ".yaml", ".png", ".key", ".key_secret")
METHODS = {"engine.set_recording", "engine.detach", "engine.generate"}  # of SGLangClient


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_files_in_the_text_exist(page: Path) -> None:
    """Paths are relative to the page, the repository or the package; results may be named by their file alone."""
    homes = [
        page.parent,
        ROOT,
        ROOT / "aurora_rl",
        ROOT / "benchmarks" / "results",
        ROOT / "tests" / "envs" / "verification",
    ]
    for path in re.findall(r"`([\w./]+\.(?:py|json|yaml|toml))`", prose(page)):
        if path not in RUN and "/" in path or path.endswith(".json") and path not in RUN:
            assert any((home / path).exists() for home in homes), path


RUN = {
    "config.json",
    "generation_config.json",
    "summary.json",
    "results.json",
    "progress.json",
    "train.json",
    "manifest.json",
    "prometheus.json",
}  # of models and of runs


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    """`mkdocs build --strict` checks them as well, without README.md and CONTRIBUTING.md."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        aim = page.parent / path if path else page
        assert aim.exists(), target
        if anchor:
            assert anchor in [slug(title) for title in re.findall(r"^#+ (.+)$", aim.read_text(), re.M)], target


def slug(title: str) -> str:
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


def test_the_index_of_the_results_names_every_section() -> None:
    index, *sections = re.split(r"^## (.+)$", (DOCS / "results.md").read_text(), flags=re.M)
    linked = re.findall(r"^\|.*\(#([\w-]+)\) \|$", index, re.M)
    assert {slug(title) for title in sections[::2]} == set(linked)


RESULTS = (DOCS / "results.md", DOCS / "results_earlier.md")


@pytest.mark.parametrize("page", RESULTS, ids=page_name)
def test_no_result_is_of_a_command_that_was_not_kept(page: Path) -> None:
    text = " ".join(page.read_text().split())
    lost = r"[^.|]*(?:not kept|no script|neither command|no file|files? (?:does|do) not have)[^.|]*"
    assert re.findall(lost, text, re.I) == []


@pytest.mark.parametrize("page", RESULTS, ids=page_name)
def test_every_table_of_the_results_has_a_command(page: Path) -> None:
    """It is in a block of the section, or in a results file that the section names. What was tried has no figures."""
    _, *sections = re.split(r"^##+ (.+)$", page.read_text(), flags=re.M)
    without = [
        title
        for title, text in zip(sections[::2], sections[1::2], strict=True)
        if "\n|---" in text and not re.search(r"^```(?:bash|python)$", text, re.M) and not commands_of_files(text)
    ]
    assert set(without) <= {"What was tried and did not help"}


def commands_of_files(text: str) -> list[str]:
    files = [ROOT / "benchmarks" / "results" / name for name in re.findall(r"`([\w/]+\.json)`", text)]
    found = [json.loads(file.read_text()).get("command") for file in files if file.exists()]
    return [command for command in found if command]


def test_no_results_file_is_of_a_command_that_was_not_kept() -> None:
    files = (ROOT / "benchmarks" / "results").rglob("*.json")
    assert [file.name for file in files if "not kept" in json.loads(file.read_text()).get("command", "")] == []


# Each line of families.md takes a model: tests/testing/test_families.py.
@pytest.mark.parametrize("page", sorted(GENERATED.keys() - {"families.md"}))
def test_generated_pages_are_current(page: str) -> None:
    text = "\n".join(GENERATED[page]()) + "\n"
    assert (DOCS / page).read_text() == text, "run `python docs/generate.py`"


def test_the_page_of_the_http_api_names_every_field() -> None:
    from aurora_rl.serving.http import schemas

    taken = {
        *schemas.ChatCompletionBody.NAMES,
        *schemas.CompletionBody.NAMES,
        "include_usage",
        "include_obfuscation",
    }
    named = re.findall(r"`(\w+)`", (DOCS / "reference" / "http.md").read_text())
    assert taken | HARMLESS | NEUTRAL.keys() <= set(named)


def test_the_page_of_the_http_api_names_every_status_of_an_error() -> None:
    sources = [path.read_text() for path in (ROOT / "aurora_rl" / "serving" / "http").glob("*.py")]
    answered = {status for source in sources for status in re.findall(r"ApiError\(\s*(\d{3}),", source)}
    page = (DOCS / "reference" / "http.md").read_text().split("## Errors")[1]
    assert len(answered) > 10 and answered <= set(re.findall(r"\b[45]\d\d\b", page))


def test_the_metrics_of_an_answer_on_the_http_page_are_those_of_its_histogram() -> None:
    shown = json.loads(blocks(DOCS / "reference" / "http.md", "text")[0])
    told = shown["speculative_decoding"]
    assert shown == draft_metrics(
        [told["acceptance_histogram"]],
        num_drafted=told["num_draft_tokens"],
        num_spec_tokens=told["num_spec_tokens"],
        drafter_version=shown["drafter_version"],
    )


def test_the_quickstart_has_every_command_and_which_of_them_take_keys() -> None:
    text = (DOCS / "quickstart.md").read_text().split("## The commands")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `aurora-rl (\w+)", text, re.M)) == COMMANDS.keys()
    (said,) = re.findall(r"^All but (.+?), which take a folder", text, re.M)
    modules = {name: importlib.import_module(f"aurora_rl.cli.{each.module}") for name, each in COMMANDS.items()}
    without = {name for name, module in modules.items() if "add_no_config_arguments" in vars(module)}
    assert set(re.findall(r"`(\w+)`", said)) == without


def test_the_walks_name_at_most_six_files() -> None:
    text = (DOCS / "design.md").read_text().split("## Walks")[1].split("\n## ")[0]
    walks = re.findall(r"^\*\*(.+?\?)\*\*(.*?)(?=^\*\*|\Z)", text, re.M | re.S)
    assert [question for question, _ in walks] == [
        "Where does a request go?",
        "How does it get there?",
        "What is learned, and how?",
        "How do several processes take a step?",
        "What crosses the wire?",
        "How do new weights get in?",
        "How does a fleet start?",
        "What does a key do?",
    ]
    for question, walk in walks:
        assert 2 <= len(set(re.findall(r"`([\w/]+\.py)`", walk))) <= 6, question
        assert not re.findall(r"`[\w/]+/`", walk), f"{question} a folder may be any number of files"


def test_the_tree_of_the_design_page_is_the_package() -> None:
    table = (DOCS / "design.md").read_text().split("## The tree")[1].split("\n## ")[0]
    rooms = {room.strip("/") for room in re.findall(r"`([\w/]+/)`", table)}
    folders = {p.name for p in (ROOT / "aurora_rl").iterdir() if (p / "__init__.py").exists()}
    assert folders <= rooms


@pytest.mark.parametrize(("page", "least"), [("sglang.md", 16), ("vllm.md", 8), ("troubleshooting.md", 16)])
def test_messages_that_troubleshooting_quotes_are_in_the_code(page: str, least: int) -> None:
    """What stands before and after a `…` is some text of the library, as its parts are written."""
    nodes = [node for file in (ROOT / "aurora_rl").rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))]
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    known = "\n".join(
        re.sub(r"%[sdr]|%\.0f", "\n", text) for text in texts | {"address already in use"}
    )  # the system's
    table = (DOCS / page).read_text().split("## Troubleshooting")[-1]
    quoted = [code for row in re.findall(r"^\| (.+?) \|", table, re.M) for code in re.findall("`([^`]*)`", row)]
    parts = [part.strip(" =,:[]") for code in quoted if " " in code for part in code.split("…")]
    assert len(parts) >= least and [part for part in parts if part not in known] == []
