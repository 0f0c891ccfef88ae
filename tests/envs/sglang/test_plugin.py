"""What the plugin refuses to attach to, and what becomes of its own faults. The rest is shown on real SGLang."""

from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import pytest
import torch
from attach_fields import DRAFT_VOCAB, FIELDS, HANDSHAKE, HEAD

from aurora_rl.collectors.codec import checksum
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.envs.remote.plugin_server import PluginError
from aurora_rl.envs.remote.recorded_totals import RecordedTotals
from aurora_rl.envs.sglang import plugin as plugin_module
from aurora_rl.envs.sglang.plugin import Plugin
from aurora_rl.envs.sglang.ranks import EngineRanks, Order
from aurora_rl.envs.sglang.swaps import Swaps
from aurora_rl.sampling_params import SamplingParams

BETWEEN_BATCHES = "sglang.srt.managers.scheduler.Scheduler.process_input_requests"


class EAGLEWorkerV2(SimpleNamespace):
    """By the name of the worker that the hooks know."""


class LlamaForCausalLMEagle3(torch.nn.Module):
    """By the name of a drafter that learns."""


@pytest.fixture
def engine(monkeypatch):
    """What the checks read of a scheduler: arguments, feature layers, head and draft map."""
    monkeypatch.setattr(plugin_module, "version", lambda name: plugin_module.SUPPORTED[-1])
    args = SimpleNamespace(
        speculative_algorithm="EAGLE3",
        speculative_use_rejection_sampling=False,
        speculative_accept_threshold_single=1.0,
        speculative_accept_threshold_acc=1.0,
        speculative_num_steps=3,
        speculative_eagle_topk=1,
        speculative_num_draft_tokens=4,
        model_path="org/model",
        disable_cuda_graph=True,
        tp_size=1,
        dp_size=1,
    )
    args.resolved_dict = lambda: {"tp_size": 1, "pp_size": 1, "enable_dp_attention": False, "attn_cp_size": 1}
    # The head has rows of padding after the vocabulary, as SGLang's has.
    head = SimpleNamespace(weight=torch.cat([HEAD, torch.zeros(2, 2)]))
    target = SimpleNamespace(
        model=SimpleNamespace(layers_to_capture=[2, 4]),
        lm_head=head,
        logits_processor=object(),
        config=SimpleNamespace(vocab_size=6, num_hidden_layers=7),
    )
    drafter = LlamaForCausalLMEagle3()
    drafter.config = SimpleNamespace(draft_vocab_size=3, vocab_size=6)
    runner = SimpleNamespace(model=drafter, device="cpu")
    plugin = Plugin("tcp://127.0.0.1:*")
    plugin._scheduler = SimpleNamespace(
        server_args=args,
        max_running_requests=6,
        is_hybrid_ssm=False,
        model_config=SimpleNamespace(context_len=512, dtype=torch.float32),
        draft_worker=EAGLEWorkerV2(draft_worker=SimpleNamespace(draft_runner=runner, hot_token_id=DRAFT_VOCAB)),
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(model=target)),
    )
    plugin._swaps = Swaps(plugin._scheduler, EngineRanks())
    yield plugin
    plugin._answer("detach", {})


def test_a_fitting_engine_is_attached_to(engine):
    assert not engine._answer("status", {})["attached"]
    status = engine._answer("attach", FIELDS)
    assert status["attached"] and status["recording"] and status["version"] == 0
    assert not engine._answer("detach", {})["attached"]


def test_the_server_says_what_it_serves_and_how_it_drafts(engine):
    status = engine._answer("status", {})
    served = {
        name: status[name] for name in ("model", "dtype", "depth", "width", "num_nodes", "slots", "context", "device")
    }
    assert served == {
        "model": "org/model", "dtype": "float32", "depth": 3, "width": 1, "num_nodes": 3, "slots": 6,
        "context": 512, "device": "cpu",
    }  # fmt: skip


def test_a_session_is_known_by_its_name_and_its_end_tells_what_it_came_to(engine):
    assert engine._answer("status", {})["session"] == ""
    first = engine._answer("attach", FIELDS)["session"]
    engine._session.assembler.totals = RecordedTotals(2, 1, 12, 30, 20, 8, 24, {1: 4, 2: 4})
    over = engine._answer("detach", {})
    assert (over["attached"], over["session"]) == (False, first)
    assert over["served"] == {
        "requests": 2, "terminated": 1, "prompt_tokens": 12, "tokens": 30, "speculative_tokens": 20,
        "speculative_rounds": 8, "drafted_tokens": 24, "accepted": {1: 4, 2: 4}, "acceptance_length": 2.5,
    }  # fmt: skip
    assert "served" not in engine._answer("status", {})
    second = engine._answer("attach", FIELDS)
    assert second["session"] not in ("", first) and second["served"]["requests"] == 0


def test_a_server_that_does_not_speculate_says_so(engine):
    engine._scheduler.server_args.speculative_algorithm = None
    message = r"no drafter \(speculative_algorithm is None\); start it with --speculative-algorithm EAGLE3 or EAGLE"
    usual = engine._scheduler.draft_worker
    for worker in (None, SimpleNamespace(draft_worker=None)):
        engine._scheduler.draft_worker = worker
        for kind in ("status", "attach"):
            with pytest.raises(PluginError, match=message):
                engine._answer(kind, FIELDS)
    engine._scheduler.draft_worker = usual


@pytest.mark.parametrize("rows", [DRAFT_VOCAB, None])
def test_eagle_reads_the_input_of_the_head_and_may_have_the_whole_vocabulary(engine, rows):
    engine._scheduler.server_args.speculative_algorithm = "EAGLE"
    engine._draft_worker.hot_token_id = rows
    del engine._draft_worker.draft_runner.model.config.draft_vocab_size
    with pytest.raises(PluginError, match=r"feature_layers is \(2, 4\) at the learner and \(7,\) at the engine"):
        engine._answer("attach", FIELDS)
    vocab = checksum({"draft_vocab": torch.arange(6) if rows is None else rows})
    own = Handshake(**{**HANDSHAKE.__dict__, "feature_layers": (7,), "draft_map_checksum": vocab, "drafter": "eagle"})
    assert engine._answer("attach", {**FIELDS, "handshake": own.to_meta()})["attached"]
    engine._answer("detach", {})
    other_vocab = Handshake(**{**own.__dict__, "draft_map_checksum": checksum({"draft_vocab": torch.tensor([1])})})
    with pytest.raises(PluginError, match="draft vocabulary.*--speculative-token-map"):
        engine._answer("attach", {**FIELDS, "handshake": other_vocab.to_meta()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"speculative_algorithm": "NGRAM"},
            "speculative_algorithm is 'NGRAM'.*--speculative-algorithm EAGLE3 or EAGLE",
        ),
        ({"resolved_dict": lambda: {"tp_size": 2, "pp_size": 2}}, "pp_size=2 is not supported"),
        ({"speculative_use_rejection_sampling": True}, "without --speculative-use-rejection-sampling"),
        ({"speculative_accept_threshold_acc": 0.9}, "speculative_accept_threshold_acc=0.9 changes the text"),
        ({"speculative_accept_threshold_single": 0.5}, "speculative_accept_threshold_single=0.5 changes the text"),
    ],
)
def test_a_server_started_otherwise_is_refused(engine, change, message):
    for name, value in change.items():
        setattr(engine._scheduler.server_args, name, value)
    with pytest.raises(PluginError, match=message):
        engine._answer("attach", FIELDS)
    assert not engine._answer("status", {})["attached"]


def test_drafters_whose_weights_cannot_be_swapped_are_refused(engine):
    model = engine._draft_worker.draft_runner.model
    model.register_parameter("fc", torch.nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False))
    with pytest.raises(
        PluginError, match=r"quantized \('fc' is int8\).*--speculative-draft-model-quantization unquant"
    ):
        engine._answer("attach", FIELDS)
    engine._draft_worker.draft_runner.model = torch.nn.Linear(1, 1)
    with pytest.raises(PluginError, match="SGLang's drafter is a Linear; use one of LlamaForCausalLMEagle3, Llama"):
        engine._answer("attach", FIELDS)


def test_other_workers_other_versions_and_missing_hooks_are_refused(engine, monkeypatch):
    engine._missing = ["sglang.srt.speculative.eagle_utils.eagle_sample"]
    with pytest.raises(
        PluginError,
        match="hooks are not in force in SGLang 0.5.21: sglang.srt.*eagle_sample.*supported: 0.5.21",
    ):
        engine._answer("attach", FIELDS)
    engine._missing = []
    monkeypatch.setattr(plugin_module, "version", lambda name: "0.5.17")
    with pytest.raises(PluginError, match=r"SGLang 0.5.17 is not supported; install sglang==0.5.21"):
        engine._answer("attach", FIELDS)
    monkeypatch.undo()
    monkeypatch.setattr(plugin_module, "version", lambda name: "0.5.21")
    engine._scheduler.draft_worker = SimpleNamespace(draft_worker=engine._draft_worker)
    with pytest.raises(PluginError, match="worker SimpleNamespace"):
        engine._answer("attach", FIELDS)


def test_the_supported_version_is_the_one_that_the_tests_run():
    try:
        assert version("sglang") in plugin_module.SUPPORTED
    except PackageNotFoundError:
        pytest.skip("SGLang is not installed")


def test_unknown_fields_rates_out_of_range_and_unknown_requests_are_refused(engine):
    with pytest.raises(PluginError, match=r"attach knows no \['colour'\]"):
        engine._answer("attach", {**FIELDS, "colour": 1})
    with pytest.raises(PluginError, match=r"capture_rate must lie in \[0, 1\], got 1.5"):
        engine._answer("attach", {**FIELDS, "capture_rate": 1.5})
    with pytest.raises(PluginError, match="no request 'dance'"):
        engine._answer("dance", {})
    with pytest.raises(PluginError, match="nothing is attached"):
        engine._answer("record", {"on": True})


def test_a_fault_of_ours_switches_recording_off_and_the_engine_has_its_answer(engine):
    engine._answer("attach", FIELDS)
    batch = SimpleNamespace(forward_mode=SimpleNamespace(is_idle=lambda: False), reqs=[SimpleNamespace(rid="1")])
    session = engine._session
    session.assembler.begin("1", [1, 2], 0, 0, SamplingParams())
    engine._head = torch.zeros(1, 2), torch.zeros(1, 6)
    # An engine whose functions give something else than the recorder knows.
    answer = engine._verify(
        lambda *args: "answer",
        object(),
        batch,
        SimpleNamespace(next_token_logits=torch.zeros(1, 6), hidden_states=torch.zeros(1, 4)),
    )
    assert answer == "answer"
    status = engine._answer("status", {})
    assert not status["recording"] and "ValueError" in status["error"]
    assert engine._answer("record", {"on": True})["recording"]


@pytest.mark.parametrize("hook", sorted(Plugin("").hooks().keys() - {BETWEEN_BATCHES}))
def test_no_hook_lets_a_fault_through(engine, hook):
    """Arguments of which nothing that the recorder looks at is there."""
    engine._answer("attach", FIELDS)
    engine._scheduler.tp_worker = None
    assert engine.hooks()[hook](lambda *args: "answer", object(), object(), object()) == "answer"
    assert not engine._answer("status", {})["recording"]


def test_orders_travel_with_the_requests_and_sglang_does_not_see_them(engine):
    engine._swaps = SimpleNamespace(
        ranks=EngineRanks(),
        reports=[],
        due=lambda session, rounds: [Order("end")],
        obey=lambda order, logits: obeyed.append(order),
        forget=lambda: None,
    )
    obeyed, sent = [], ["request"]
    received = engine._send_orders(lambda receiver, requests, local_reqs: requests, object(), sent, local_reqs=[])
    assert received == ["request", Order("end")] and sent == ["request"]
    assert engine._between_batches(lambda scheduler, requests: requests, engine._scheduler, received) == ["request"]
    assert obeyed == [Order("end")]
    # Another rank has no requests of its own, and decides nothing.
    engine._swaps.ranks.rank = 1
    assert engine._send_orders(lambda receiver, requests: requests, object(), None) is None


def test_a_fault_of_the_engine_reaches_the_engine(engine):
    engine._answer("attach", FIELDS)

    def fail(*args):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        engine._draft(fail, SimpleNamespace(topk=1), SimpleNamespace(spec_info=None))
    assert engine._answer("status", {})["recording"]
