"""The plugin in a worker, on batches of a stand-in: whose requests are kept, and by which weights they were drafted.

That real vLLM's batches are these is shown in tests/vllm.
"""

import time
from types import SimpleNamespace

import pytest
import torch
from attach_fields import FIELDS
from tensordict import TensorDict

from aurora_rl.envs.remote.plugin_server import PluginError
from aurora_rl.envs.remote.session import SwapError
from aurora_rl.envs.vllm import plugin as plugin_module
from aurora_rl.envs.vllm.batches import Draft
from aurora_rl.envs.vllm.plugin import Plugin
from aurora_rl.envs.vllm.scheduler_notes import FLUSH, NOTES, Ended, Notes

PARAMS = dict(
    temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=None, extra_args=None, logit_bias=None, stop=[],
    frequency_penalty=0.0, presence_penalty=0.0, repetition_penalty=1.0, min_tokens=0, allowed_token_ids=None,
    bad_words=None, thinking_token_budget=None, structured_outputs=None,
)  # fmt: skip
FEATURES, HIDDEN, VOCAB, DEPTH = 4, 2, 6, 2


class Runner:
    """Executes what a test lays out as a batch, and says what the test says."""

    def __init__(self):
        self.device, self.num_spec_tokens = torch.device("cpu"), DEPTH
        self.execute_model_state = None
        self.input_batch = SimpleNamespace()
        self.drafter = SimpleNamespace(model=SimpleNamespace(compute_logits=lambda states: states))
        self.vllm_config = SimpleNamespace(
            speculative_config=SimpleNamespace(num_speculative_tokens=DEPTH),
            model_config=SimpleNamespace(model="org/model", dtype=torch.float32, max_model_len=512),
            scheduler_config=SimpleNamespace(max_num_seqs=6),
        )
        self.fits = True

    def _input_fits_in_drafter(self, metadata):
        return metadata

    def lay_out(self, requests):
        """Requests by id: the start, the tokens there and after, the number of drafts, and what is said."""
        ids = list(requests)
        self.input_batch.req_ids = ids
        self.input_batch.num_computed_tokens_cpu = [requests[rid]["start"] for rid in ids]
        self.input_batch.num_prompt_tokens = [requests[rid]["prompt"] for rid in ids]
        rows = torch.zeros(len(ids), 64, dtype=torch.int32)
        for row, rid in zip(rows, ids, strict=True):
            row[requests[rid]["start"]] = requests[rid]["root"]
        self.input_batch.token_ids_cpu = rows.numpy()
        self.said = [requests[rid]["said"] for rid in ids]
        batch = SimpleNamespace(
            num_scheduled_tokens={rid: requests[rid]["count"] for rid in ids},
            scheduled_spec_decode_tokens={rid: r["drafts"] for rid, r in requests.items() if r["drafts"]},
            scheduled_new_reqs=[],
            finished_req_ids=set(),
        )
        setattr(batch, NOTES, Notes({}, {}, False))
        return batch

    def execute_model(self, batch, tensors=None):
        total = sum(batch.num_scheduled_tokens.values())
        heads = sum(1 + len(batch.scheduled_spec_decode_tokens.get(rid, ())) for rid in batch.num_scheduled_tokens)
        self.execute_model_state = SimpleNamespace(
            scheduler_output=batch,
            aux_hidden_states=[torch.full((total + 1, FEATURES // 2), float(layer)) for layer in (1, 2)],
            spec_decode_common_attn_metadata=self.fits,
            sample_hidden_states=torch.arange(heads * HIDDEN, dtype=torch.float32).view(heads, HIDDEN),
        )

    def sample_tokens(self, grammar):
        self.execute_model_state = None
        for step in range(DEPTH):
            logits = torch.zeros(len(self.said), VOCAB)
            logits[:, step] = 1.0
            self.drafter.model.compute_logits(logits)
        return SimpleNamespace(sampled_token_ids=self.said)


class Loader:
    def __init__(self):
        self.loaded, self.refuses = [], False

    def load(self, weights):
        if self.refuses:
            raise SwapError("they do not fit")
        self.loaded.append(weights)


@pytest.fixture
def plugin(monkeypatch):
    """A plugin that a learner is attached to; its trajectories are kept."""
    for check in ("check_server", "check_models"):
        monkeypatch.setattr(plugin_module, check, lambda *args, **kwargs: None)
    monkeypatch.setattr(plugin_module, "DraftLoader", lambda *args: Loader())
    monkeypatch.setattr(plugin_module, "vllm_version", lambda: "0.32.0")

    class Fresh(Runner):  # hooks stay on the class
        get_model = get_draft_model = lambda self: None  # noqa: E731

    plugin = Plugin("tcp://127.0.0.1:*")
    wrapper = SimpleNamespace(worker=SimpleNamespace(rank=0, model_runner=Fresh()))
    plugin.on_worker(lambda wrapper: None, wrapper)
    plugin._answer("attach", FIELDS)
    plugin.out = []
    plugin._session.assembler._emit = lambda trajectory, *_: plugin.out.append(trajectory)
    yield plugin
    plugin._answer("detach", {})
    plugin._server.close()


def new(rid, prompt, **params):
    return SimpleNamespace(
        req_id=rid, prompt_token_ids=prompt, num_computed_tokens=0, lora_request=None, mm_features=[],
        prompt_embeds=None, sampling_params=SimpleNamespace(**PARAMS | params),
    )  # fmt: skip


def run(plugin, requests, *, begins=(), ends=None, salts=None, flushed=False):
    runner = plugin._runner
    batch = runner.lay_out(requests)
    batch.scheduled_new_reqs, batch.finished_req_ids = list(begins), set(ends or {})
    setattr(batch, NOTES, Notes(ends or {}, salts or {}, flushed))
    runner.execute_model(batch, None)
    return runner.sample_tokens(None)


def prefill(said):
    return {"start": 0, "count": 3, "prompt": 3, "root": 1, "drafts": [], "said": said}


def round_at(start, root, drafts, said):
    return {"start": start, "count": 1 + len(drafts), "prompt": 3, "root": root, "drafts": drafts, "said": said}


def await_recorded(plugin, count=1):
    deadline = time.monotonic() + 5
    while len(plugin.out) < count:
        assert time.monotonic() < deadline, dict(plugin._session.assembler.counts)
        time.sleep(0.005)
    return plugin.out[-1]


def publish(plugin, number):
    """As if weights had come."""
    tree = TensorDict({"fc.weight": torch.tensor([1.0])}, batch_size=[])
    plugin._session.receiver.latest = lambda once=[(number, tree)]: once.pop() if once else None


def test_a_request_s_rounds_have_the_version_that_drafted_them(plugin):
    run(plugin, {"r-1": prefill([4])}, begins=[new("r-1", [1, 2, 3])])
    publish(plugin, 5)
    # What is verified here was drafted before the swap, at the end of the batch before.
    out = run(plugin, {"r-1": round_at(3, 4, [0, 1], [0, 5])})
    assert plugin._session.version == 5 and getattr(out, FLUSH)
    run(plugin, {"r-1": round_at(5, 5, [0, 1], [2])})
    run(plugin, {"r-2": prefill([4])}, ends={"r-1": Ended([4, 0, 5, 2], "FINISHED_LENGTH_CAPPED")})
    trajectory = await_recorded(plugin)
    assert trajectory["sequence", "tokens"].tolist() == [1, 2, 3, 4, 0, 5, 2]
    assert trajectory["rounds", "policy_version"].tolist() == [0, 5]
    assert trajectory["rounds", "cache_version"].tolist() == [0, 0]
    assert trajectory["nodes", "accepted"].tolist() == [True, False, False, False]
    assert trajectory["sequence", "features"].tolist() == [[1.0, 1.0, 2.0, 2.0]] * 6
    # Chosen tokens have one logit of 1 among zeros.
    expected = float(torch.tensor([1.0] + [0.0] * (VOCAB - 1)).log_softmax(0)[0])
    torch.testing.assert_close(trajectory["nodes", "log_probs"], torch.full((4,), expected))
    assert plugin._answer("status", {})["swaps"] == 1


def test_fillers_are_no_drafts(plugin):
    run(plugin, {"1": prefill([4])}, begins=[new("1", [1, 2, 3])])
    plugin._runner.fits = False
    run(plugin, {"1": round_at(3, 4, [0, 1], [0, 5])})
    run(plugin, {"1": round_at(5, 5, [0, 0], [0, 2])})  # a filler that the target happened to say
    run(plugin, {}, ends={"1": Ended([4, 0, 5, 0, 2], "FINISHED_LENGTH_CAPPED")})
    trajectory = await_recorded(plugin)
    assert trajectory["rounds", "anchor"].tolist() == [3, 5, 6]
    assert trajectory["rounds", "offset"].tolist() == [0, 2, 2, 2]
    assert len(trajectory["sequence", "features"]) == 7


def test_a_part_has_no_filler_that_may_be_past_the_end(plugin):
    plugin._session.assembler._part_tokens = 1
    run(plugin, {"1": prefill([4])}, begins=[new("1", [1, 2, 3])])
    run(plugin, {"1": round_at(3, 4, [0, 1], [0, 5])})
    plugin._runner.fits = False
    run(plugin, {"1": round_at(5, 5, [0, 1], [0, 2])})
    # Fillers, both of which the target happened to say; the text may end at the first.
    run(plugin, {"1": round_at(7, 2, [0, 0], [0, 0, 3])})
    assert await_recorded(plugin)["sequence", "tokens"].tolist() == [1, 2, 3, 4, 0, 5]
    run(plugin, {}, ends={"1": Ended([4, 0, 5, 0, 2, 0], "FINISHED_STOPPED")})
    last = await_recorded(plugin, 2)
    assert last["sequence", "tokens"].tolist() == [1, 2, 3, 4, 0, 5, 0, 2, 0]
    assert last["sequence", "prompt_length"] == 6 and last["rounds", "anchor"].tolist() == [5, 7]
    status = plugin._answer("status", {})
    assert (status["recorded"], status["served"]["tokens"], status["served"]["prompt_tokens"]) == (1, 6, 3)


def test_who_is_left_out_is_counted_by_reason(plugin):
    begins = [new("1", [1, 2, 3]), new("2", [1, 2, 3], min_p=0.5), new("3", [1, 2, 3], stop=["x"]), new("4", [1, 2, 3])]
    run(plugin, {rid: prefill([4]) for rid in "1234"}, begins=begins)
    ends = {"1": "FINISHED_ABORTED", "2": "FINISHED_STOPPED", "3": "FINISHED_ABORTED"}
    run(plugin, {"4": round_at(3, 4, [0], [5])}, ends={rid: Ended([4], status) for rid, status in ends.items()})
    assert await_recorded(plugin)["request"] == 3  # it ended at its stop string
    status = plugin._answer("status", {})
    assert status["skipped"] == {"aborted": 1, "min_p": 1} and status["recorded"] == 1
    assert status["served"]["terminated"] == 1 and "4" in plugin._session.assembler


def test_recording_is_switched_off_and_on(plugin):
    plugin._answer("record", {"on": False})
    run(plugin, {"1": prefill([4])}, begins=[new("1", [1, 2, 3])])
    assert "1" not in plugin._session.assembler
    plugin._answer("record", {"on": True})
    run(plugin, {"2": prefill([4])}, begins=[new("2", [1, 2, 3])])
    assert "2" in plugin._session.assembler


def test_tenants_are_known_by_their_salts(plugin):
    run(plugin, {"1": prefill([4])}, begins=[new("1", [1, 2, 3])], salts={"1": "t@x"})
    plugin._answer("delete", {"tenant": "t"})
    run(plugin, {}, ends={"1": Ended([4], "FINISHED_STOPPED")})
    plugin._session.assembler.close()
    assert plugin._session.assembler.counts == {"deleted": 1} and plugin.out == []


def test_weights_are_taken_while_nothing_runs(plugin):
    publish(plugin, 2)
    deadline = time.monotonic() + 5
    while plugin._session.version != 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [list(weights) for weights in plugin._loader.loaded] == [["fc.weight"]]


def test_no_weights_are_taken_between_the_halves_of_a_batch(plugin):
    runner = plugin._runner
    runner.execute_model(runner.lay_out({"1": prefill([4])}), None)
    publish(plugin, 2)
    time.sleep(0.2)
    assert plugin._session.version == 0
    runner.sample_tokens(None)
    deadline = time.monotonic() + 5
    while plugin._session.version != 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_weights_that_do_not_fit_are_rejected(plugin):
    rejected, session = [], plugin._session
    session.receiver.reject = lambda number, reason: rejected.append((number, reason))
    plugin._loader.refuses = True
    publish(plugin, 2)
    run(plugin, {"1": prefill([4])})
    assert rejected == [(2, "they do not fit")] and session.version == 0


def test_the_prefix_cache_is_wished_empty_until_it_is(plugin):
    assert getattr(run(plugin, {"1": prefill([4])}), FLUSH)  # what is in it when a learner attaches, nobody saw
    assert not hasattr(run(plugin, {"1": prefill([4])}, flushed=True), FLUSH)


def test_a_fault_of_ours_switches_recording_off_and_the_engine_has_its_answer(plugin):
    plugin._runner.input_batch.num_computed_tokens_cpu = None
    batch = plugin._runner.lay_out({"1": prefill([4])})
    delattr(batch, NOTES)
    plugin._runner.execute_model(batch, None)
    assert plugin._runner.sample_tokens(None).sampled_token_ids == [[4]]
    status = plugin._answer("status", {})
    assert not status["recording"] and "the scheduler's process says nothing of its requests" in status["error"]


def test_the_server_says_what_it_serves_and_how_it_drafts(plugin):
    status = plugin._answer("status", {})
    expected = {
        "vllm": "0.32.0", "missing": [], "device": "cpu", "model": "org/model", "dtype": "float32", "context": 512,
        "depth": DEPTH, "width": 1, "num_nodes": DEPTH, "slots": 6, "attached": True,
    }  # fmt: skip
    assert {name: status[name] for name in expected} == expected
    type(plugin._runner).sample_tokens = lambda self, grammar: None
    assert plugin._answer("status", {})["missing"] == ["Fresh.sample_tokens"]


def test_further_workers_do_not_answer():
    plugin = Plugin("tcp://127.0.0.1:*")
    plugin.on_worker(lambda wrapper: None, SimpleNamespace(worker=SimpleNamespace(rank=1, model_runner=None)))
    assert plugin._server is None


def test_a_second_learner_is_refused_and_changes_nothing_of_the_first_one_s_requests(plugin):
    plugin._stopping, plugin._drafts["a"] = {"a"}, Draft(1)
    with pytest.raises(PluginError, match="attached already"):
        plugin._answer("attach", FIELDS)
    assert list(plugin._stopping) == list(plugin._drafts) == ["a"]


def test_a_fault_of_the_scores_stays_ours(plugin):
    plugin._scores = []
    plugin._guarded(plugin._score, None)  # as where a copy of the logits finds no memory
    assert plugin._scores is None and not plugin._session.recording
