"""Prompts that are read along with rounds: the texts are those of plain decoding, and nobody waits long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    BloomConfig,
    DeepseekV3Config,
    Gemma2Config,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from warped import warp_logits

from aurora_kernels.noise import gumbel
from aurora_rl.envs import (
    Completion,
    Engine,
    Request,
    SamplingParams,
    SpecDecodeEnv,
    TransformersEngine,
    chunked_prefill,
)
from aurora_rl.envs.chunked_prefill import ChunkedPrefill
from aurora_rl.prefix_cache import PrefixCache
from aurora_rl.testing import tiny_target

SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "initializer_range": 0.4, "max_position_embeddings": 256,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
# In each form of attention that the engine has: all of a text, a window, chunks of it, and distances.
CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "sliding window": lambda: MistralConfig(**SIZES, sliding_window=7),
    "window in every second layer, eager": lambda: Gemma2Config(
        **SIZES, sliding_window=9, query_pre_attn_scalar=4, attn_logit_softcapping=5.0
    ),
    "chunks": lambda: Llama4TextConfig(
        **SIZES, intermediate_size_mlp=32, num_local_experts=2, attention_chunk_size=24, interleave_moe_layer_step=1,
        layer_types=["chunked_attention", "full_attention"],
    ),
    "alibi": lambda: BloomConfig(vocab_size=32, hidden_size=16, n_layer=2, n_head=4, initializer_range=0.4),
    "latent": lambda: DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4}, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4,
        v_head_dim=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
}  # fmt: skip


def model_of(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return Auto.from_config(config, attn_implementation="eager").eval().requires_grad_(False)


@torch.inference_mode()
def plain_text(model: PreTrainedModel, request: Request) -> list[int]:
    """What follows a prompt, from a pass over the whole text for each token."""
    text, wanted = request.prompt[None], request.sampling_params
    for position in range(len(request.prompt), len(request.prompt) + wanted.max_tokens):
        logits = model(text, use_cache=False).logits[0, -1]
        if wanted.temperature:
            noise = gumbel(torch.tensor(wanted.seed), torch.tensor(position), len(logits))
            logits = warp_logits(logits, wanted.temperature, wanted.top_k, wanted.top_p) + noise
        text = torch.cat([text, logits.argmax()[None, None]], dim=1)
    return text[0, len(request.prompt) :].tolist()


def requests(*shapes: tuple[int, int], temperature: float = 0.0) -> list[Request]:
    """Requests of (prompt length, budget); every second one is sampled if there is a temperature."""
    generator = torch.Generator().manual_seed(1)
    return [
        Request(
            i,
            torch.randint(3, 32, (length,), generator=generator),
            SamplingParams(temperature if i % 2 else 0.0, seed=i, max_tokens=budget),
        )
        for i, (length, budget) in enumerate(shapes)
    ]


class WholePrompts(TransformersEngine):
    """An engine that cannot stop within a prompt, as third parties' may be."""

    prefill_chunk, verify_with_chunk = Engine.prefill_chunk, Engine.verify_with_chunk

    def prefill(self, slots: Sequence[int], prompts: Sequence[Tensor]) -> None:
        for slot, prompt in zip(slots, prompts, strict=True):
            TransformersEngine.prefill_chunk(self, slot, prompt, 0, len(prompt))


class World:
    """An environment, what its engine read along with rounds, and what came out."""

    def __init__(self, engine: Engine, waiting: Sequence[Request]) -> None:
        self.queue, self.done, self.chunks = list(waiting), {}, []  # type: ignore[var-annotated]
        engine.__dict__.pop("verify_with_chunk", None)  # of a world before this one
        self.engine, verify_with_chunk = engine, engine.verify_with_chunk

        def noted(*arguments: Any) -> tuple[Tensor, int]:
            hidden, read = verify_with_chunk(*arguments)
            self.chunks.append((arguments[-1].slot, arguments[-1].done, read))
            return hidden, read

        engine.verify_with_chunk = noted  # type: ignore[method-assign]
        self.env = SpecDecodeEnv(
            engine, lambda: self.queue.pop(0) if self.queue else None, num_nodes=4, on_completion=self._completed
        )
        self.env._prefill.end_round = lambda: None  # chunks of 16 tokens, whatever rounds take here

    def _completed(self, completion: Completion) -> None:
        self.done[completion.request.id] = completion

    def run(self) -> dict[int, list[int]]:
        td = self.env.reset()
        while self.env.num_active:
            td = self.env.step_and_maybe_reset(self.env.rand_action(td))[1]
        return {id: completion.tokens.tolist() for id, completion in self.done.items()}


# Prompts of several chunks that come while others decode, two at once among them, and short ones between them.
SHAPES = ((3, 4), (5, 26), (70, 3), (50, 4), (1, 4), (90, 3))


@pytest.mark.parametrize("name", CONFIGS)
def test_texts_and_features_are_those_of_whole_prompts(name: str) -> None:
    model = model_of(CONFIGS[name]())
    waiting = requests(*SHAPES, temperature=0.8)
    texts = {request.id: plain_text(model, request) for request in waiting}
    engine, sequences = TransformersEngine(model, num_slots=3, max_length=128, feature_layers=(0, 2)), []
    for kind in (TransformersEngine, WholePrompts):
        engine.__class__ = kind
        world = World(engine, waiting)
        assert world.run() == texts
        sequences.append([world.done[request.id].trajectory["sequence"] for request in waiting])
        parts = [read - done for _, done, read in world.chunks]
        assert (max(parts) <= 17 and len(parts) > 9) if kind is TransformersEngine else max(parts) >= 50, parts
    for chunked, whole in zip(*sequences, strict=True):
        for key in ("tokens", "features", "hidden"):
            torch.testing.assert_close(chunked[key], whole[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sliding window", "chunks", "alibi", "latent"])
def test_texts_and_features_are_those_of_prompts_without_kept_rows(name: str) -> None:
    """A second turn that is longer than a window, whose history is taken over, with what chunks it is read in."""
    model = model_of(CONFIGS[name]())
    first, beside = requests((30, 12), (4, 60))
    said = torch.tensor(plain_text(model, first))
    second = Request(2, torch.cat([first.prompt, said, torch.arange(3, 30)]), SamplingParams(max_tokens=8))
    texts = {request.id: plain_text(model, request) for request in (first, beside, second)}
    engine, features = TransformersEngine(model, num_slots=2, max_length=128, feature_layers=(0, 2)), []
    for kept in (True, False):
        engine.prefix_cache = PrefixCache(200) if kept else None
        world = World(engine, [first, beside, second])
        assert world.run() == texts
        assert (world.chunks[0] == (0, 0, 41 + 16)) if kept else (world.chunks[0] == (0, 0, 16))
        assert [world.done[each].cached_tokens for each in range(3)] == [0, 0, 41 if kept else 0]
        features.append(world.done[2].trajectory["sequence", "features"])
    torch.testing.assert_close(*features, rtol=1e-4, atol=1e-5)


def engine(slots: int = 2, max_length: int = 128) -> TransformersEngine:
    return TransformersEngine(tiny_target(), num_slots=slots, max_length=max_length, feature_layers=(0, 1))


def test_a_chunk_a_round_and_the_first_come_is_read_first() -> None:
    waiting = requests((3, 2), (4, 60), (2, 2), (40, 3), (33, 3))
    world = World(engine(slots=3), waiting)
    world.run()
    assert world.chunks == [(0, 0, 16), (0, 16, 32), (0, 32, 40), (2, 0, 16), (2, 16, 33)]


def test_while_nothing_decodes_prompts_are_read_whole() -> None:
    world = World(engine(), requests((50, 3), (60, 3)))
    world.run()
    assert world.chunks == [] and world.engine.prefill_seconds > 0


def test_a_prompt_is_read_to_its_end_once_nothing_decodes() -> None:
    waiting = requests((3, 2), (4, 4), (100, 3))
    texts = {request.id: plain_text(tiny_target(), request) for request in waiting}
    world = World(engine(), waiting)
    assert world.run() == texts
    read = [read for _, _, read in world.chunks]
    assert read[0] == 16 and len(read) < 4  # the rest in one piece, which nobody waited for


def test_a_full_reset_drops_what_is_read_and_slots_hold_requests_meanwhile() -> None:
    world = World(engine(), requests((3, 2), (4, 30), (100, 3), (5, 2)))
    td = world.env.reset()
    while not world.chunks:
        td = world.env.step_and_maybe_reset(world.env.rand_action(td))[1]
    assert world.env.num_active == 2 and len(world.engine.store.occupied) == 1
    world.run()
    assert sorted(world.done) == [0, 3]


class Running:
    """An engine whose slot 0 decodes, in rounds of so many seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slots: int = 2) -> None:
        self.clock, self.engine = 0.0, engine(slots)
        self.engine.prefill([0], [torch.tensor([5, 6, 7])])
        monkeypatch.setattr(chunked_prefill.time, "perf_counter", lambda: self.clock)
        self.prefill = ChunkedPrefill(self.engine)

    def round(self, seconds: float = 1.0) -> None:
        none = torch.zeros(1, 0, dtype=torch.int64)
        self.prefill.verify(torch.tensor([0]), none, none, none.bool())
        self.clock += seconds
        self.prefill.end_round()


def test_a_request_is_dropped_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Running(monkeypatch, slots=3)
    (first, second), prefill = requests((50, 3), (20, 3)), world.prefill
    prefill.add(1, first)
    prefill.add(2, second)
    world.round()
    assert prefill.take([1, 2], decoding=True) == [] and len(prefill) == 2
    assert prefill.drop(first.id) and not prefill.drop(first.id) and 1 not in prefill and 2 in prefill
    assert prefill.take([1, 2], decoding=False) == [(2, second)] and world.engine.store.lengths.tolist() == [3, 0, 20]


@pytest.mark.parametrize("clear", [True, False])
def test_a_request_is_dropped_whose_prompt_a_round_has_just_completed(
    clear: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = Running(monkeypatch)
    (request,), prefill = requests((10, 3)), world.prefill
    prefill.add(1, request)
    world.round()
    assert world.engine.store.lengths.tolist() == [3, 10] and len(prefill) == 1
    assert prefill.clear() is None if clear else prefill.drop(request.id)
    assert world.engine.store.lengths.tolist() == [3, 0] and len(prefill) == 0


def test_a_request_is_cancelled_in_the_round_that_completes_its_prompt() -> None:
    world = World(engine(), requests((3, 2), (4, 12), (14, 3), (5, 2)))
    world.env.on_tokens = lambda *args: world.chunks and world.env.cancel(2)
    world.run()
    assert world.chunks[0] == (0, 0, 14) and sorted(world.done) == [0, 1, 3]
    assert world.engine.store.lengths.tolist() == [0, 0]


def test_a_round_with_a_chunk_is_one_pass() -> None:
    world, passes = World(engine(), requests((3, 2), (4, 60), (50, 3))), []
    td = world.env.reset()
    world.engine.model.model.register_forward_hook(lambda *args: passes.append(len(world.chunks)))
    steps = 0
    while world.env.num_active:
        td, steps = world.env.step_and_maybe_reset(world.env.rand_action(td))[1], steps + 1
    assert len(world.chunks) == 4 and len(passes) == steps


@pytest.mark.parametrize(("times", "grows"), [(1.5, True), (1.7, False)])
def test_a_chunk_grows_as_long_as_its_round_takes_less_than_twice_one_without(
    times: float, grows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = Running(monkeypatch)
    prefill = world.prefill
    for seconds in (3.0, 2.0, 1.0):  # without
        world.round(seconds)
    prefill.chunk = 32
    prefill.add(1, requests((100, 3))[0])
    sizes = []
    for _ in range(3):
        world.round(2 * times)
        sizes.append(prefill.chunk)
    assert sizes == ([36, 40, 40] if grows else [25, 20, 16])  # the last tokens of a prompt tell nothing
    prefill.clear()
    prefill.chunk = 8  # and no shorter
    prefill.add(1, requests((100, 3))[0])
    world.round(2 * times)
    assert prefill.chunk == (9 if grows else 8)


def test_what_a_chunk_adds_is_time_of_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Running(monkeypatch)
    before = world.engine.prefill_seconds
    world.round(2.0)
    world.prefill.add(1, requests((125, 3))[0])
    world.round(3.5)
    world.round(1.0)  # shorter than without
    assert world.engine.prefill_seconds == pytest.approx(before + 1.5)


def test_what_the_engine_counts_itself_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Running(monkeypatch)
    before = world.engine.prefill_seconds

    def counts(*arguments: Any) -> tuple[Tensor, int]:
        world.engine.prefill_seconds += 3.0
        return TransformersEngine.verify_with_chunk(world.engine, *arguments)

    monkeypatch.setattr(world.engine, "verify_with_chunk", counts)
    world.round(2.0)
    world.prefill.add(1, requests((125, 3))[0])
    world.round(4.0)
    assert world.engine.prefill_seconds == pytest.approx(before + 3.0)


def test_prompts_that_nobody_waits_for_make_no_round_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    world = Running(monkeypatch)
    world.clock += 100.0
    world.prefill.take([], decoding=False)
    world.round(2.0)
    assert list(world.prefill._rounds) == [2.0]


def test_after_eight_rounds_with_a_chunk_one_is_measured_without(monkeypatch: pytest.MonkeyPatch) -> None:
    world, passes = Running(monkeypatch), []
    world.engine.model.model.register_forward_hook(lambda module, args, out: passes.append(len(out[0][0])))
    world.prefill.chunk, world.prefill.end_round = 10, lambda: None  # type: ignore[method-assign]
    world.prefill.add(1, requests((125, 3))[0])
    for _ in range(15):
        world.round()
    assert passes == [11] * 8 + [1] + [11] * 4 + [5, 1]
