"""What of a running vLLM is refused, by name."""

from types import SimpleNamespace

import pytest
import torch
from attach_fields import DRAFT_VOCAB, HANDSHAKE, HEAD

from aurora_rl.envs.remote.plugin_server import PluginError
from aurora_rl.envs.vllm.refusals import SUPPORTED, check_models, check_server

EMBEDDING = object()


@pytest.fixture
def runner():
    """What the checks read of a model runner: configuration, feature layers, head and draft map."""
    drafting = SimpleNamespace(
        method="eagle3",
        parallel_drafting=False,
        rejection_sample_method="standard",
        draft_sample_method="greedy",
        num_speculative_tokens_per_batch_size=None,
    )
    drafting.uses_dynamic_speculative_decoding = lambda: drafting.num_speculative_tokens_per_batch_size is not None
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    config = SimpleNamespace(
        use_v2_model_runner=False,
        scheduler_config=SimpleNamespace(async_scheduling=False),
        parallel_config=SimpleNamespace(**dict.fromkeys(sizes, 1)),
        speculative_config=drafting,
        model_config=SimpleNamespace(logits_processors=None, enable_sleep_mode=False),
        weight_transfer_config=None,
        device_config=SimpleNamespace(device_type="cpu"),
        compilation_config=SimpleNamespace(mode=0),
    )
    # The head has rows of padding after the vocabulary, as vLLM's has.
    target = SimpleNamespace(
        model=SimpleNamespace(aux_hidden_state_layers=(2, 4), embed_tokens=EMBEDDING),
        lm_head=SimpleNamespace(weight=torch.cat([HEAD, torch.zeros(2, 2)])),
    )
    drafter = SimpleNamespace(
        config=SimpleNamespace(draft_vocab_size=3),
        draft_id_to_target_id=DRAFT_VOCAB - torch.arange(3),
        model=SimpleNamespace(embed_tokens=EMBEDDING),
    )
    return SimpleNamespace(
        vllm_config=config,
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace(vocab_size=6, num_hidden_layers=7)),
        get_model=lambda: target,
        get_draft_model=lambda: drafter,
    )


def check(runner, missing=(), version=SUPPORTED[-1]):
    check_server(runner.vllm_config, missing=list(missing), version=version)
    check_models(runner, HANDSHAKE)


def test_a_fitting_engine_is_taken(runner):
    check(runner)


@pytest.mark.parametrize("version", ["0.31.1", "0.33.0", "unknown"])
def test_other_versions_are_refused(runner, version):
    with pytest.raises(PluginError, match=rf"vLLM {version} is not supported; install vllm==0.32.0"):
        check(runner, version=version)


def test_hooks_that_are_not_in_force_are_named(runner):
    with pytest.raises(PluginError, match="hooks are not in force in vLLM 0.32.0: CPUModelRunner.sample_tokens"):
        check(runner, missing=["CPUModelRunner.sample_tokens"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_v2_model_runner": True}, "set VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"scheduler_config.async_scheduling": True}, "start the server with --no-async-scheduling"),
        ({"parallel_config.tensor_parallel_size": 2}, "one worker is needed, this has tensor_parallel_size=2"),
        ({"parallel_config.pipeline_parallel_size": 2}, "this has pipeline_parallel_size=2"),
        ({"parallel_config.data_parallel_size": 4}, "this has data_parallel_size=4"),
        ({"speculative_config": None}, "the speculative method is None; start the server with --speculative-config"),
        ({"speculative_config.method": "ngram"}, "the speculative method is 'ngram'"),
        ({"speculative_config.method": "medusa"}, "the speculative method is 'medusa'"),
        ({"speculative_config.parallel_drafting": True}, "parallel drafting is not recorded"),
        ({"speculative_config.num_speculative_tokens_per_batch_size": [(1, 2, 3)]}, "one length is recorded"),
        (
            {"speculative_config.rejection_sample_method": "synthetic"},
            "rejection_sample_method='synthetic' has another",
        ),
        ({"speculative_config.draft_sample_method": "probabilistic"}, "draft_sample_method='probabilistic' is not"),
        ({"model_config.logits_processors": ["mine:Processor"]}, "--logits-processors change the distribution"),
        ({"compilation_config.mode": 3}, "start the server with --enforce-eager"),
        ({"model_config.enable_sleep_mode": True}, "leave --enable-sleep-mode out"),
        ({"weight_transfer_config": object()}, "leave --weight-transfer-config out"),
    ],
)
def test_a_server_started_otherwise_is_refused(runner, change, message):
    for path, value in change.items():
        *above, name = path.split(".")
        place = runner.vllm_config
        for each in above:
            place = getattr(place, each)
        setattr(place, name, value)
    with pytest.raises(PluginError, match=message):
        check(runner)


def test_compiled_code_is_no_reason_on_a_gpu(runner):
    runner.vllm_config.compilation_config.mode = 3
    runner.vllm_config.device_config.device_type = "cuda"
    check(runner)


def test_another_target_or_drafter_is_refused(runner):
    target = runner.get_model()
    target.model.aux_hidden_state_layers = (3, 5)
    with pytest.raises(PluginError, match=r"feature_layers is \(2, 4\) at the learner and \(3, 5\) at the engine"):
        check(runner)
    target.model = None
    with pytest.raises(PluginError, match=r"\(2, 4\) at the learner and \(\) at the engine"):
        check(runner)
    target.model = SimpleNamespace(aux_hidden_state_layers=(2, 4), embed_tokens=EMBEDDING)
    target.lm_head.weight = target.lm_head.weight + 1
    with pytest.raises(PluginError, match="output head differs from the learner's .*float32"):
        check(runner)
    target.lm_head.weight = target.lm_head.weight - 1
    runner.get_draft_model().model.embed_tokens = object()
    with pytest.raises(PluginError, match="the drafter has an embedding of its own"):
        check(runner)
    runner.get_draft_model().model.embed_tokens = EMBEDDING
    runner.get_draft_model().draft_id_to_target_id += 1
    with pytest.raises(PluginError, match=r"draft vocabulary \(d2t\) differs"):
        check(runner)
    target.lm_head = None
    with pytest.raises(PluginError, match="no output head of its own"):
        check(runner)
