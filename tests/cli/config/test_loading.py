from __future__ import annotations

from pathlib import Path

import pytest

from aurora_rl.cli.config import Config, load_config, to_yaml
from aurora_rl.cli.errors import ConfigError


def test_pairs_override_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("engine: {slots: 3, threads: 2}\nmodel: here\ndrafter: {feature_layers: [1, 2]}\n")
    config = load_config(file, ["engine.slots=5", "traffic.limit=7", "drafter.path=null"])
    assert (config.engine.slots, config.engine.threads, config.model) == (5, 2, "here")
    assert config.drafter.feature_layers == (1, 2)
    assert config.traffic.limit == 7
    assert config.engine.max_length == Config().engine.max_length


def test_what_is_printed_loads_back_equal(tmp_path: Path) -> None:
    config = load_config(overrides=["drafter.feature_layers=[0,2]", "run_dir=a b", "learner.adam_lr=3e-4", "seed=4"])
    (tmp_path / "printed.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "printed.yaml") == config
    (tmp_path / "defaults.yaml").write_text(to_yaml(Config()))
    assert load_config(tmp_path / "defaults.yaml") == Config() == load_config()


@pytest.mark.parametrize(
    "text",
    [
        "/tmp/my run #1",
        "1e5",
        "007",
        "12:30:45",
        "yes",
        "&a",
        "[",
        "{a: b}",
        "a=b",
        " x ",
        "null and more",
        "$x",
        "a?b",
        "C:\\x",
    ],
)
def test_a_string_takes_the_text_as_it_stands(tmp_path: Path, text: str) -> None:
    config = load_config(overrides=[f"traffic.path={text}", f"model={text}", f"run_dir={text}"])
    assert config.traffic.path == config.model == config.run_dir == text
    (tmp_path / "printed.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "printed.yaml") == config


def test_a_string_may_name_other_keys() -> None:
    config = load_config(overrides=["run_dir=runs/${drafter.name}-${seed}/a", "drafter.name=ngram", "seed=7"])
    assert config.run_dir == "runs/ngram-7/a"


def test_null_lists_and_mappings_are_read_as_yaml(tmp_path: Path) -> None:
    pairs = ["traffic.path=null", "model=null", "engine.arguments=[--a, b]", "drafter.options={model: tiny, n: 3}"]
    config = load_config(overrides=pairs)
    assert (config.traffic.path, config.model, config.engine.arguments) == (None, "null", ("--a", "b"))
    assert config.drafter.options == {"model": "tiny", "n": 3}


def test_a_saved_configuration_names_no_folder(tmp_path: Path) -> None:
    text = to_yaml(load_config(overrides=["run_dir=here", "seed=4"]), run_dir=False)
    assert "run_dir" not in text
    (tmp_path / "saved.yaml").write_text(text)
    assert load_config(tmp_path / "saved.yaml") == load_config(overrides=["seed=4"])


@pytest.mark.parametrize(
    ("pair", "wrong"),
    [
        ("drafter=eagle3", "unknown key 'drafter' in drafter=eagle3; did you mean 'drafter.name=eagle3'[?]"),
        ("learner.buffer=3", "learner.buffer=3 is less than learner.batch_size=4, .*set learner.buffer=4 or more"),
        ("learner.batch_size=2001", "learner.buffer=2000 is less than learner.batch_size=2001"),
        ("control.share=0.2", "^control.share=.*: 'control.share' is called 'baseline.share' now$"),
        ("engine.control=tcp://x:1", "^engine.control=.*: 'engine.control' is called 'engine.plugin_address' now$"),
        ("drafter.made_for=any", "^drafter.made_for=.*: 'drafter.made_for' is called 'drafter.trained_for' now$"),
        ("canary.most_rounds=8", "^canary.most_rounds=.*: 'canary.most_rounds' is called 'canary.max_rounds' now$"),
        ("canary.most_requests=8", "^canary.most_requests=.* is called 'canary.max_requests' now$"),
        ("learner.decay=0.9", r"'learner.decay' is set by objectives=\[\{name: imitation, decay: ...\}\] now$"),
        ("learner.steps=3", r"'learner.steps' is set by objectives=\[\{name: imitation, steps: ...\}\] now$"),
        ("learner.record=stream", "^learner.record=.*: 'learner.record' is called 'learner.recording' now$"),
        ("engine.slot=2", "unknown key 'engine.slot' in engine.slot=2; did you mean 'engine.slots'?"),
        ("slots=2", "unknown key 'slots' in slots=2; did you mean"),
        ("engine=x", "unknown key 'engine' in engine=x; did you mean 'engine.name=x'?"),
        (
            "engine=null",
            "^engine in engine=null is a section of keys, not a value; set its keys, such as engine.name=VALUE$",
        ),
        ("engine=[slots]", r"^engine in engine=\[slots\] is a section of keys, not a value; set its keys, such as"),
        ("learner=3", "^learner in learner=3 is a section .* such as learner.spawn=VALUE$"),
        ("learner.lr=1", "^unknown key 'learner.lr' in .*; did you mean 'learner.muon_lr' or 'learner.adam_lr'[?]$"),
        ("lr=1", "did you mean 'learner.muon_lr' or 'learner.adam_lr'[?]$"),
        ("keep=1", "did you mean 'learner.keep' or 'checkpoint.keep'[?]$"),
        ("engine.temperature=1", "unknown key 'engine.temperature' in .*; did you mean 'temperature'[?]$"),
        ("engine.threds=1", "did you mean 'engine.threads'[?]$"),
        ("1=1", "^unknown key '1' in 1=1; aurora-rl serve --print-config prints all keys$"),
        ("engine.xx=1", "^unknown key 'engine.xx' in engine.xx=1; engine has name, slots, max_length, "),
        (
            "wire.zzz=1",
            "^unknown key 'wire.zzz' in wire.zzz=1; wire has trajectories, weights, queue, queue_bytes, .*keys$",
        ),
        ("engine.slots.more=2", "unknown key 'engine.slots.more' in engine.slots.more=2; did you mean 'engine.slots'?"),
        ("engine.slots", "expected key=value, got 'engine.slots'; for example engine.slots=2"),
        ("drafter.feature_layers=[1,1]", r"drafter.feature_layers must rise, .* got \[1, 1\]"),
        ("engine.slots=0", "engine.slots must be at least 1, got 0"),
        ("max_new_tokens=0", "max_new_tokens must be at least 1 or null, got 0"),
        ("traffic.limit=0", "traffic.limit must be at least 1 or null, got 0"),
        ("baseline.share=1", r"baseline.share must lie in \[0, 1\), got 1.0"),
        ("learner.max_skipped=0", r"learner.max_skipped must be at least 1, got 0"),
        ("learner.nice=20", "learner.nice must lie in 0..19, got 20"),
        ("learner.replay=-1", "learner.replay must not be negative, got -1"),
        ("learner.muon_lr=nan", "learner.muon_lr must not be negative, got nan"),
        ("temperature=-1", "^temperature must be a finite number of at least 0, got -1.0$"),
        ("temperature=nan", "^temperature must be a finite number of at least 0, got nan$"),
        ("top_p=0", "^top_p must be above 0 and at most 1, got 0.0$"),
        ("min_p=1.5", r"^min_p must lie in \[0, 1\], got 1.5$"),
        ("top_k=-2", "^top_k must be at least -1, got -2$"),
        ("engine.max_length=1", "^engine.max_length must be at least 2, for a prompt and an answer, or null, got 1$"),
        ("traffic.path=", "^traffic.path is empty; name a file, or null$"),
        ("dtype=float8", "dtype must be auto, float32, bfloat16, float16 or float64, got 'float8'"),
        ("generation_config=vllm", "generation_config must be auto or ignore, got 'vllm'"),
        ("drafter.trained_for=mine", "drafter.trained_for must be target or any, got 'mine'"),
        ("engine.capture_rate=2", r"engine.capture_rate must lie in \[0, 1\], got 2"),
        ("wire.weights=localhost:1", "wire.weights must be tcp://host:port or ipc://path, got 'localhost:1'"),
        ("wire.weights=tcp://127.0.0.1:5557", "wire.trajectories and wire.weights must differ"),
        ("drafter.options=[", r"drafter.options=\[: not a valid value"),
        ("http.cors_origins=[*]", r'http.cors_origins=\[\*\]: not a valid value: .*; give YAML, .* as in \["\*"\]$'),
        ("model=${nowhere}", r"model=\$\{nowhere\}: .* such as \$\{model\}, got '\$\{nowhere\}'"),
        ("model=${engine}", r"model=\$\{engine\}: .*, got '\$\{engine\}'"),
        ("model=${oc.env:HOME}", r"model=\$\{oc.env:HOME\}: .*, got '\$\{oc.env:HOME\}'"),
        ("run_dir=a${b", r"run_dir=a\$\{b: .*, got '\$\{b'"),
        ("run_dir=x${y", r"run_dir=x\$\{y: .*, got '\$\{y'"),
        ("run_dir=${model}/${", r"run_dir=\$\{model\}/\$\{: .*, got '\$\{'"),
        (r"run_dir=a\${model}", r"run_dir=a\\\$\{model\}: .*, got '\$\{model\}'"),
        ("run_dir=${run_dir}", "Recursive interpolation detected .*run_dir"),
        ("model=???", r"model=\?\?\? in .*: \?\?\? stands for no value"),
        ("run_dir=???", r"run_dir=\?\?\? in .*: \?\?\? stands for no value"),
        ("engine.slots=???", r"engine.slots=\?\?\? in .*: \?\?\? stands for no value"),
        ("drafter.options=???", r"drafter.options=\?\?\? in .*: \?\?\? stands for no value"),
        ("wire.weights=tcp://127.0.0.1:99999", "wire.weights=tcp://127.0.0.1:99999: a port lies in 1..65535"),
    ],
)
def test_one_clear_error(pair: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        load_config(overrides=[pair])


def test_batch_invariance_is_of_the_embedded_engine() -> None:
    needs = "engine.batch_invariant=true needs engine.name=transformers, got"
    for engine, fix in (("sglang", r", and set engine.arguments=\[--enable-deterministic-inference\]"), ("vllm", "")):
        with pytest.raises(ConfigError, match=f"^{needs} '{engine}'; leave it out{fix}$"):
            load_config(overrides=["engine.batch_invariant=true", f"engine.name={engine}"])


@pytest.mark.parametrize(
    ("pairs", "wrong"),
    [
        (["engine.url=http://host:30000"], "http://host:30000 and engine.plugin_address=null go together; set both"),
        (
            ["engine.plugin_address=tcp://127.0.0.1:1"],
            "^engine.url=null and engine.plugin_address=tcp://127.0.0.1:1 go together; set both",
        ),
        (
            ["engine.url=http://host:30000", "engine.plugin_address=tcp://127.0.0.1:1"],
            "attaches to a running.*set drafter.path",
        ),
        (["drafter.mode=sampled", "drafter.name=eagle3"], "got drafter.mode=sampled; set drafter.mode=topk"),
        (["rule=greedy"], "verifies by a rule of its own, got rule=greedy; set rule=null"),
    ],
)
def test_what_sglang_cannot_do(pairs: list[str], wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong):
        load_config(overrides=["engine.name=sglang", *pairs])


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("engine: [", "run.yaml is not valid YAML: while parsing"),
        ("- engine", "run.yaml holds no mapping of keys, but '- engine'; write"),
        ("engine: {slotz: 1}", "unknown key 'engine.slotz' in .*run.yaml; did you mean 'engine.slots'?"),
        (
            "control: {share: 0}\nlearner: {record: x, nice: 1}",
            "run.yaml: 'control.share' is called 'baseline.share' now, 'learner.record' is called .*",
        ),
        ("model: ???", r"model=\?\?\? in .*run.yaml: \?\?\? stands for no value"),
        ("root:x:0:0\n" * 50, r"run.yaml holds no mapping of keys, but '.{1,100}'; write lines such as model: smollm2"),
        ("7", "run.yaml holds no mapping of keys, but '7'; write"),
        ("m" * 500 + ": 1", "^unknown key 'm{80}' in .*run.yaml; aurora-rl serve --print"),
        ("drafter: {feature_layers: 1}", r"run.yaml: drafter.feature_layers is 1; give a list, such as .*s: \[1\]"),
        (
            "engine: [slots]",
            r"^engine in .*run.yaml is a section of keys, .*; set its keys, such as engine.name: VALUE$",
        ),
        ("engine: sglang", "^unknown key 'engine' in .*run.yaml; did you mean 'engine.name: sglang'[?]$"),
        (
            "objectives: [kl]",
            r'run.yaml: objectives holds "?.kl.; give mappings, such as objectives: \[{name: imitation}\]$',
        ),
        ("drafter: {options: [1]}", r"run.yaml: drafter.options is \[1\]; give a mapping, such as .*: {NAME: VALUE}$"),
        (
            "engine.slots: 2\nengine: {slots: 3}",
            "run.yaml: engine.slots is given twice, nested and as engine.slots; leave",
        ),
        (
            "engine: sglang\nengine.slots: 3",
            "run.yaml: engine.slots is given, and engine is 'sglang'; leave one of them",
        ),
        ("engine.slots.more: 2", "^unknown key 'engine.slots.more' in .*run.yaml; did you mean 'engine.slots'[?]$"),
        ("engine.: 2", "^unknown key 'engine.' in .*run.yaml; engine has name, slots, "),
        ("1: 2", "^unknown key '1' in .*run.yaml; aurora-rl serve --print-config prints all keys$"),
        ("engine: {slots: many}", "run.yaml: engine.slots is 'many'; give an integer$"),
        ("model: null", "run.yaml: model is null; give a text$"),
        ("objectives: [{name: imitation}]\nseed: x", "run.yaml: seed is 'x'; give an integer$"),
        (b"\xff\xfe\x00", "cannot read the configuration file .*run.yaml|run.yaml is not valid YAML"),
        (None, "cannot read the configuration file .*run.yaml.*No such file"),
    ],
)
def test_errors_of_a_file_name_the_file(tmp_path: Path, text: str | bytes | None, wrong: str) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=wrong):
        load_config(file)


def test_an_empty_file_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "run.yaml") == Config()


def test_an_empty_section_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("learner:\n  # nice: 1\nengine: {}\nwire: null\ndrafter:\n  options:\nseed: 3\n")
    assert load_config(tmp_path / "run.yaml") == load_config(overrides=["seed=3"])


def test_a_file_takes_the_keys_of_the_command_line(tmp_path: Path) -> None:
    text = "engine.max_length: 512\nengine: {slots: 3}\ndrafter.options.fc_norm: true\nlearner:\nlearner.nice: 1\n"
    (tmp_path / "run.yaml").write_text(text + "model: m\nrun_dir: runs/${model}\n")
    pairs = ["engine.max_length=512", "engine.slots=3", "drafter.options.fc_norm=true", "learner.nice=1", "model=m"]
    assert load_config(tmp_path / "run.yaml") == load_config(overrides=[*pairs, "run_dir=runs/m"])


def test_the_values_of_an_earlier_run_count_where_no_other_is_named(tmp_path: Path) -> None:
    (tmp_path / "saved.yaml").write_text(to_yaml(load_config(overrides=["seed=4", "engine.slots=3", "model=m"])))
    (tmp_path / "run.yaml").write_text("seed: 5\n")
    config = load_config(tmp_path / "run.yaml", ["model=n"], saved=tmp_path / "saved.yaml")
    assert (config.seed, config.engine.slots, config.model) == (5, 3, "n")
