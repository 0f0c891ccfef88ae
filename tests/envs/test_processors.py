"""A model's generation config: speculation delivers the text of `generate`, and no field is ignored silently."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

from aurora_rl.envs import Request, SamplingParams, SpecDecodeEnv, TransformersEngine, generation_processors
from aurora_rl.envs.processors import process, text_settings
from aurora_rl.policies import DrafterPolicy, TargetParts, TreeShape
from aurora_rl.policies.eagle3 import Eagle3Drafter
from aurora_rl.testing import tiny_target

VOCAB, NODES, BUDGET, STOP = 12, 6, 16, 6
# Unequal lengths, one of them a single token, for which alone a first token is forced.
PROMPTS = tuple(map(torch.tensor, ([1, 2, 5], [4, 7, 8, 9, 1, 3], [2])))

CHANGES: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.5},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 3.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[5], [1, 6], [11, 10]]},
    "sequence_bias": {"sequence_bias": [[[5], -4.0], [[11, 10], 5.0], [[7, 1], 3.0]]},
    "suppress_tokens": {"suppress_tokens": [1, 11]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [11]},
    "min_length": {"min_length": 12},
    "min_new_tokens": {"min_new_tokens": 9},
    "a shortest length in new tokens goes before one in all": {"min_length": 15, "min_new_tokens": 6},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": [2, 1.2]},
    "forced_bos_token_id": {"forced_bos_token_id": 7},
    "forced_eos_token_id": {"forced_eos_token_id": [STOP]},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=3.0)},
    "several": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 9, "suppress_tokens": [4, 11]},
    "what is forced after what is forbidden": {"forced_eos_token_id": STOP, "bad_words_ids": [[1]], "min_length": 12},
    "every token forbidden": {"suppress_tokens": list(range(VOCAB))},
}
HARMLESS: dict[str, dict[str, Any]] = {
    "remove_invalid_values": {"remove_invalid_values": True},
    "renormalize_logits": {"renormalize_logits": True},
}


def target(fields: dict[str, Any], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The tiny model with these fields in its generation config."""
    model = tiny_target(vocab_size=VOCAB, dtype=dtype)
    for name, value in {"eos_token_id": [STOP], **fields}.items():
        setattr(model.generation_config, name, value)
    return model


def generated(model: PreTrainedModel, budget: int = BUDGET) -> list[list[int]]:
    """transformers' own greedy text after each prompt."""
    return [
        model.generate(
            prompt[None],
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=budget,
            do_sample=False,
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]


@functools.cache
def without_fields() -> list[list[int]]:
    return generated(target({}))


def drafts(texts: Sequence[list[int]], shape: str) -> Callable[[TensorDictBase], TensorDictBase]:
    """Proposes the texts, every third token wrong; a tree has two nodes at each depth and grows from both."""
    wrong = iter(range(10**6))

    def policy(td: TensorDictBase) -> TensorDictBase:
        draft = TensorDict(
            {
                "tokens": torch.zeros(len(td), NODES, dtype=torch.int64),
                "parents": torch.full((len(td), NODES), -1),
                "mask": torch.zeros(len(td), NODES, dtype=torch.bool),
            },
            batch_size=[len(td)],
        )
        rows = zip(td["request"].tolist(), td["observation", "position"].tolist(), strict=True)
        for slot, (request, position) in enumerate(rows):
            if request < 0 or shape == "plain":
                continue
            node, parents = 0, [-1]
            for token in texts[request][position + 1 - len(PROMPTS[request]) :]:
                level = [(token + 5 * (next(wrong) % 3 == 2)) % VOCAB]
                if shape == "tree":  # the right one second, with children of both
                    level = [(level[0] + 1) % VOCAB, *level]
                if node + len(level) > NODES:
                    break
                for i, drafted in enumerate(level):
                    draft["tokens"][slot, node + i], draft["parents"][slot, node + i] = (
                        drafted,
                        parents[i % len(parents)],
                    )
                parents = [node + len(level) - 1, node]
                node += len(level)
            draft["mask"][slot, :node] = True
        return td.set("draft", draft)

    return policy


@functools.cache
def engine_in(dtype: torch.dtype) -> TransformersEngine:
    """Two slots of the tiny model. One engine for all cases: it does not look at the generation config."""
    return TransformersEngine(target({}, dtype), num_slots=2, max_length=64, feature_layers=(0, 1))


def served(
    model: PreTrainedModel, texts: Sequence[list[int]], shape: str, sampling: SamplingParams | None = None
) -> tuple[list[list[int]], int]:
    """The text of each prompt from two slots, and how many nodes were accepted."""
    engine = engine_in(model.dtype)
    queue = [Request(i, p, replace(sampling or SamplingParams(), max_tokens=BUDGET)) for i, p in enumerate(PROMPTS)]
    done: dict[int, list[int]] = {}
    env = SpecDecodeEnv(
        engine,
        lambda: queue.pop(0) if queue else None,
        num_nodes=NODES,
        stop_tokens=(STOP,),
        processors=generation_processors(model, (STOP,)),
        on_completion=lambda completion: done.update({completion.request.id: completion.tokens.tolist()}),
    )
    td, policy, accepted = env.reset(), drafts(texts, shape), 0
    while env.num_active:
        step, td = env.step_and_maybe_reset(policy(td))
        accepted += int(step["next", "verifier", "accepted"].sum())
    return [done[i] for i in range(len(PROMPTS))], accepted


# ---- the text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CHANGES, *HARMLESS])
def test_greedy_text_is_that_of_generate(name: str) -> None:
    model = target({**CHANGES, **HARMLESS}[name])
    texts = generated(model)
    assert (texts != without_fields()) == (name in CHANGES)
    for shape in ("plain", "chain", "tree"):
        text, accepted = served(model, texts, shape)
        assert text == texts, shape
        assert accepted > 4 or shape == "plain"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_other_dtypes(dtype: torch.dtype) -> None:
    model = target(CHANGES["several"], dtype)
    plain = generated(model) if dtype == torch.float64 else served(model, PROMPTS, "plain")[0]
    assert served(model, plain, "tree")[0] == plain


@pytest.mark.parametrize("name", [*CHANGES, *HARMLESS])
def test_sampled_text_does_not_depend_on_what_is_drafted(name: str) -> None:
    model = target({**CHANGES, **HARMLESS}[name])
    sampling = SamplingParams(0.8, top_k=9, top_p=0.95, min_p=0.02, seed=4)
    plain, _ = served(model, without_fields(), "plain", sampling)
    for shape in ("chain", "tree"):
        text, accepted = served(model, plain, shape, sampling)
        assert text == plain, shape
        assert accepted > 4


def test_a_config_that_changes_nothing_has_no_processors() -> None:
    fields = {"temperature": 0.6, "top_k": 20, "top_p": 0.8, "do_sample": True, "repetition_penalty": 1.0}
    fields |= {"num_beams": 1, "max_length": 99, "pad_token_id": 0, "use_cache": False, "own_entry": "of a model"}
    assert generation_processors(target(fields), (STOP,)) is None
    bare = target({})
    bare.generation_config = None
    assert generation_processors(bare, (STOP,)) is None


@pytest.mark.parametrize("min_p", [0.0, 0.1])
@pytest.mark.parametrize(
    ("rule", "mode"),
    [("rejection", "sampled"), ("rejection_without_replacement", "sampled_without_replacement")],
)
def test_rejection_serves_the_law_of_the_processed_logits(rule: str, mode: str, min_p: float) -> None:
    """The law of two tokens, the second of which depends on the first by a penalty as well."""
    count, temperature, prompt = 700, 1.5, PROMPTS[0]
    fields = {"repetition_penalty": 4.0, "suppress_tokens": [11], "no_repeat_ngram_size": 1}
    model = target(fields, torch.float64)
    processors_of = generation_processors(model, ())
    assert processors_of is not None
    law = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    own = processors_of(Request(0, prompt, SamplingParams(max_tokens=2)))

    def after(text: torch.Tensor) -> torch.Tensor:
        p = (own(text[None], model(text[None]).logits[:, -1].float())[0].double() / temperature).softmax(-1)
        kept = torch.where(p < min_p * p.max(), 0.0, p)
        return kept / kept.sum()

    first = after(prompt)
    for token in first.nonzero().flatten():
        law[token] = first[token] * after(torch.cat([prompt, token[None]]))

    drafter = Eagle3Drafter.from_target(TargetParts.of(model), draft_vocab=torch.arange(VOCAB)).double().eval()
    engine = TransformersEngine(
        copy.deepcopy(model), num_slots=50, max_length=16, feature_layers=drafter.feature_layers
    )
    waiting = [Request(i, prompt, SamplingParams(temperature, min_p=min_p, seed=i, max_tokens=2)) for i in range(count)]
    seen = torch.zeros(VOCAB, VOCAB)
    shape, drafted = TreeShape(2, 3, mode=mode), 0

    def note(completion: Any) -> None:
        seen[tuple(completion.tokens.tolist())] += 1

    env = SpecDecodeEnv(
        engine,
        lambda: waiting.pop() if waiting else None,
        num_nodes=shape.num_nodes,
        rule=rule,
        draft_mode=mode,
        processors=processors_of,
        on_completion=note,
    )
    policy = DrafterPolicy(
        drafter,
        engine.store,
        num_nodes=shape.num_nodes,
        shape=shape,
        generator=torch.Generator().manual_seed(1),
        vocab_size=VOCAB,
    )
    td = env.reset()
    while env.num_active:
        step, td = env.step_and_maybe_reset(policy(td))
        drafted += int(step["next", "verifier", "accepted"].sum())
    assert drafted > 100
    assert int(seen[law == 0].sum()) == 0
    likely = law > 0.005
    expected = torch.cat([law[likely], law[~likely].sum()[None]]) * count
    counts = torch.cat([seen[likely], seen[~likely].sum()[None]])
    degrees = int(likely.sum())
    assert float(((counts - expected) ** 2 / expected).sum()) < degrees + 4 * (2 * degrees) ** 0.5


def test_a_sampled_tree_of_forbidden_tokens_ends_as_any_other() -> None:
    """Where nothing is left to choose from, a token comes all the same: a round never raises."""
    model = target(CHANGES["every token forbidden"], torch.float64)
    drafter = Eagle3Drafter.from_target(TargetParts.of(model), draft_vocab=torch.arange(VOCAB)).double().eval()
    engine = TransformersEngine(copy.deepcopy(model), num_slots=2, max_length=32, feature_layers=drafter.feature_layers)
    waiting = [Request(i, PROMPTS[i], SamplingParams(float(i), seed=i, max_tokens=8)) for i in range(2)]
    done: list = []
    shape = TreeShape(2, 2, mode="sampled")
    env = SpecDecodeEnv(
        engine,
        lambda: waiting.pop() if waiting else None,
        num_nodes=shape.num_nodes,
        rule="rejection",
        draft_mode="sampled",
        processors=generation_processors(model, ()),
        on_completion=done.append,
    )
    policy = DrafterPolicy(drafter, engine.store, num_nodes=shape.num_nodes, shape=shape, vocab_size=VOCAB)
    td = env.reset()
    while env.num_active:
        _, td = env.step_and_maybe_reset(policy(td))
    assert [len(completion.tokens) for completion in done] == [8, 8]


# ---- nodes ------------------------------------------------------------------------------------------------------


def test_a_processor_gets_the_text_before_each_node_and_no_other() -> None:
    """The root, a chain, siblings of one depth in one call, and an invalid node that is left out."""
    calls: list[tuple[list[list[int]], list[float]]] = []

    def note(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        calls.append((input_ids.tolist(), scores[:, 0].tolist()))
        return scores + 100

    logits = torch.arange(6, dtype=torch.float64)[:, None].expand(6, VOCAB)[None]
    out = process(
        logits,
        [torch.tensor([8, 9])],
        torch.tensor([[1, 2, 3, 4, 5]]),
        torch.tensor([[-1, -1, 0, 1, 2]]),
        torch.tensor([[True, True, True, False, True]]),
        [LogitsProcessorList([note])],
    )
    assert calls == [
        ([[8, 9]], [0.0]),
        ([[8, 9, 1], [8, 9, 2]], [1.0, 2.0]),
        ([[8, 9, 1, 3]], [3.0]),
        ([[8, 9, 1, 3, 5]], [5.0]),
    ]
    assert out[0, :, 0].tolist() == [100, 101, 102, 103, 4, 105] and out.dtype == torch.float32
    assert logits[0, :, 0].tolist() == list(range(6))


def test_processors_are_made_for_each_request() -> None:
    """The second request of a slot has its own budget: its last token is forced where its own budget ends."""
    model = target({"forced_eos_token_id": 0})
    engine = TransformersEngine(copy.deepcopy(model), num_slots=1, max_length=64, feature_layers=(0,))
    queue = [Request(i, PROMPTS[i], SamplingParams(max_tokens=budget)) for i, budget in enumerate((3, 7))]
    done: list[list[int]] = []
    env = SpecDecodeEnv(
        engine,
        lambda: queue.pop(0) if queue else None,
        num_nodes=NODES,
        processors=generation_processors(model, ()),
        on_completion=lambda completion: done.append(completion.tokens.tolist()),
    )
    td, policy = env.reset(), drafts((), "plain")
    while env.num_active:
        _, td = env.step_and_maybe_reset(policy(td))
    assert [(len(text), text[-1]) for text in done] == [(3, 0), (7, 0)]


# ---- what is refused --------------------------------------------------------------------------------------------

REFUSED = {
    "guidance_scale": 1.5,
    "token_healing": True,
    "max_time": 2.0,
    "stop_strings": ["end"],
    "num_beams": 4,
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "constraints": ["a"],
    "force_words_ids": [[1]],
    "is_assistant": True,
    "watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2]),
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_cannot_be_applied_is_refused_by_name(field: str) -> None:
    with pytest.raises(ValueError, match=rf"sets {field}=.*cannot be applied.*generation_config=ignore"):
        generation_processors(target({field: REFUSED[field]}), (STOP,))


def test_every_field_is_known_or_refused() -> None:
    """A field that a later transformers adds is not ignored silently."""
    from aurora_rl.envs import processors

    tables = (processors._APPLIED, processors._OF_THE_REQUEST, processors._WITHOUT_EFFECT, processors._OF_SAMPLING)
    sorted_fields = [*(field for table in tables for field in table), *REFUSED]
    assert sorted(set(sorted_fields)) == sorted(name for name in vars(GenerationConfig()) if not name.startswith("_"))


def test_a_field_that_transformers_adds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    start = GenerationConfig.__init__

    def newer(self: GenerationConfig, **fields: Any) -> None:
        self.new_penalty = fields.pop("new_penalty", None)
        start(self, **fields)

    monkeypatch.setattr(GenerationConfig, "__init__", newer)
    with pytest.raises(ValueError, match=r"sets new_penalty=0\.5"):
        generation_processors(target({"new_penalty": 0.5}), (STOP,))


@pytest.mark.parametrize(
    ("fields", "stops"),
    [
        ({"repetition_penalty": 0.0}, (STOP,)),
        ({"bad_words_ids": [[VOCAB]]}, (STOP,)),
        ({"forced_eos_token_id": VOCAB}, (STOP,)),
        ({"sequence_bias": [[[1], 2]]}, (STOP,)),
        ({"exponential_decay_length_penalty": [2, 1.2]}, ()),
    ],
)
def test_values_that_transformers_cannot_apply_are_named(fields: dict[str, Any], stops: tuple[int, ...]) -> None:
    (field,) = fields
    with pytest.raises(
        ValueError, match=rf"generation config \({field}=.*cannot be applied: .*generation_config=ignore"
    ):
        generation_processors(target(fields), stops)


@pytest.mark.parametrize(
    ("field", "value"),
    [("top_h", 0.4), ("typical_p", 0.9), ("epsilon_cutoff", 0.01), ("eta_cutoff", 0.01)],
)
def test_settings_of_sampling_leave_greedy_text_and_refuse_samples(field: str, value: float) -> None:
    model = target({field: value})
    assert served(model, without_fields(), "chain")[0] == without_fields()
    with pytest.raises(ValueError, match=rf"request 0: temperature 0.8 with {field}={value}.*set temperature=0"):
        served(model, without_fields(), "chain", SamplingParams(0.8))


def test_ids_of_ends_beyond_the_vocabulary_are_left_out() -> None:
    """A tokenizer may have tokens that its model has no logits for."""
    model, text = target({"exponential_decay_length_penalty": [2, 1.2]}), torch.zeros(1, 9, dtype=torch.int64)
    processors_of = generation_processors(model, (STOP, VOCAB))
    assert processors_of is not None
    out = processors_of(Request(0, PROMPTS[0], SamplingParams(max_tokens=BUDGET)))(text, torch.ones(1, VOCAB))
    assert (out > 1).nonzero().tolist() == [[0, STOP]]


def test_a_model_s_own_min_p_is_the_request_s_to_say() -> None:
    """As its temperature, top-k and top-p are."""
    assert generation_processors(target({"min_p": 0.1}), ()) is None


def test_what_a_config_changes_is_told_apart_from_what_it_says() -> None:
    config = GenerationConfig(
        repetition_penalty=1.2, top_p=0.5, min_p=0.1, num_beams=1, guidance_scale=1.0, max_time=3.0
    )
    assert text_settings(config) == {"repetition_penalty": 1.2, "max_time": 3.0}
    assert text_settings(None) == {}
