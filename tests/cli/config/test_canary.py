"""Settings of trials on live traffic: what goes with the engine, and the two drafters that are compared."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from aurora_rl.cli.config import load_config, to_yaml
from aurora_rl.cli.config.canary import compared
from aurora_rl.cli.errors import ConfigError
from aurora_rl.cli.run_dir import make_absolute
from aurora_rl.cli.spec import resolve

BOTH = "compare=[ngram,eagle3]"


def test_sglang_takes_new_weights_at_once_and_refuses_a_trial_by_name() -> None:
    assert load_config().canary.share == 0.5 and load_config(overrides=["engine.name=sglang"]).canary.share == 0
    for pair in ("canary.share=0.25", BOTH):
        with pytest.raises(ConfigError, match=rf"^{re.escape(pair.split('[')[0])}.*: SGLang keeps one drafter, and"):
            load_config(overrides=["engine.name=sglang", pair])


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["compare=[ngram]"], "compare takes two drafters, such as compare=[runs/a/drafter,runs/b/drafter], got ['ng"),
        ([BOTH, "canary.share=0"], "compare needs a share of the rounds for the second drafter, got canary.share=0"),
        ([BOTH, "learner.spawn=true"], "compare is of two drafters that stay what they are, got learner.spawn=true"),
        ([BOTH, "learner.resume=old"], "learner.resume=old has no effect with compare, as nobody learns; leave it out"),
        ([BOTH, "learner.recording=new"], "learner.recording=new has no effect with compare, as nobody learns; leave"),
        (
            [BOTH, "drafter.vocab_follows=true"],
            "drafter.vocab_follows=true has no effect with compare, as nobody learns;",
        ),
        ([BOTH, "drafter.name=medusa"], "compare=['ngram', 'eagle3'] names the drafters; leave drafter.name and"),
        (["canary.engines=0.6"], "canary.engines must lie in [0, 0.5], got 0.6"),
        (["canary.max_requests=4"], "canary.max_requests=4 is less than a window of canary.requests=8 requests; set"),
        (["canary.max_rounds=4"], "canary.max_rounds=4 is less than a window of canary.window=8 rounds; set it to 8"),
    ],
)
def test_what_does_not_go_together_is_named(pairs: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        load_config(overrides=pairs)


def test_compare_has_its_share_where_the_commands_default_is_none() -> None:
    usual = ["canary.share=0"]
    assert load_config(usual=usual).canary.share == 0
    assert load_config(overrides=[BOTH], usual=usual).canary.share == 0.5
    assert load_config(overrides=[BOTH, "canary.share=0.25"], usual=usual).canary.share == 0.25
    with pytest.raises(ConfigError, match="^compare needs a share of the rounds .*, got canary.share=0; set"):
        load_config(overrides=[BOTH, "canary.share=0"], usual=usual)


def test_names_folders_and_classes_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("mine", "ngram"):
        (tmp_path / folder).mkdir()
    config = make_absolute(load_config(overrides=["compare=[mine,aurora_rl.policies:MedusaDrafter]"]))
    assert not config.learner.spawn
    first, second = compared(config)
    assert (first.drafter.name, first.drafter.path) == (None, str(tmp_path / "mine"))
    assert (second.drafter.name, second.drafter.path) == ("aurora_rl.policies:MedusaDrafter", None)
    assert compared(first) == [first]
    hub, own = compared(make_absolute(load_config(overrides=["compare=[org/drafter,ngram]"])))
    assert (hub.drafter.name, hub.drafter.path) == (None, "org/drafter")
    assert (own.drafter.name, own.drafter.path) == ("ngram", None)  # as for LLM; "./ngram" is the folder
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("medsua", "no drafter is called 'medsua'; did you mean 'medusa'? There are"),
        ("nowhere.at:Drafter", "the drafter 'nowhere.at:Drafter' cannot be imported: No module named 'nowhere'"),
    ],
)
def test_an_unknown_drafter_is_told_which_there_are(name: str, message: str) -> None:
    says = re.escape(f"compare=['{name}', 'medusa']: '{name}' is no folder: {message}")
    with pytest.raises(ConfigError, match=f"^{says}"):
        compared(load_config(overrides=[f"compare=[{name},medusa]"]))


def test_a_command_that_serves_nobody_refuses_it() -> None:
    with pytest.raises(ConfigError, match="^compare=.* is of aurora-rl serve and aurora-rl flywheel; leave it out"):
        resolve(load_config(overrides=[BOTH]))
