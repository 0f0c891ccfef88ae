"""LLM: its text is that of plain decoding, and its prompts fail one by one."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_llm import CHAT, PROMPTS, SHORT, llm, texts
from transformers import PreTrainedTokenizerBase

from aurora_rl import LLM, Eagle3Drafter, SamplingParams, TargetParts, TreeShape
from aurora_rl.envs import SpecDecodeEnv
from aurora_rl.models.loading import ModelError, encode_chat, load_target
from aurora_rl.policies import Drafter, get_drafter
from aurora_rl.policies.formats.files import save_drafter
from aurora_rl.testing import tiny_target


@pytest.fixture(scope="module")
def drafted(tiny_folder: Path) -> LLM:
    return llm(tiny_folder, record=True)


@pytest.fixture(scope="module")
def plain(tiny_folder: Path) -> LLM:
    return llm(tiny_folder, None)


def by_transformers(
    folder: Path, prompts: list[object], count: int, dtype: torch.dtype = torch.float64
) -> list[list[int]]:
    model, tokenizer = load_target(folder, dtype=dtype, device="cpu")
    texts = []
    for prompt in prompts:
        ids = torch.tensor([encoded(tokenizer, prompt)])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
        texts.append(out[0, ids.shape[1] :].tolist())
    return texts


def encoded(tokenizer: PreTrainedTokenizerBase, prompt: object) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return encode_chat(tokenizer, prompt) if isinstance(prompt[0], dict) else list(prompt)


@pytest.mark.parametrize("drafter", ["eagle3", "ngram", None])
def test_the_text_is_that_of_transformers(tiny_folder: Path, drafter: str | None) -> None:
    served = llm(tiny_folder, drafter)
    completions = served.generate(PROMPTS, SHORT)
    assert texts(completions) == by_transformers(tiny_folder, PROMPTS, 24)
    for completion in completions:
        assert completion.text == served.tokenizer.decode(completion.tokens, skip_special_tokens=True)
        assert completion.finish_reason == ("length" if len(completion.tokens) == 24 else "stop")
        assert completion.error is None and completion.trajectory is None
        if drafter != "ngram":  # which may find nothing
            assert (completion.acceptance_length is None) == (drafter is None)


def test_the_model_s_generation_config_is_applied_or_ignored(tiny_folder: Path, tmp_path: Path, plain: LLM) -> None:
    penalized = tmp_path / "penalized"
    shutil.copytree(tiny_folder, penalized)
    fields = {"repetition_penalty": 1.5, "typical_p": 0.9}  # the second is none of greedy text
    (penalized / "generation_config.json").write_text(json.dumps(fields))
    processed, raw = by_transformers(penalized, PROMPTS, 24), texts(plain.generate(PROMPTS, SHORT))
    assert processed != raw
    assert texts(llm(penalized).generate(PROMPTS, SHORT)) == processed
    ignoring = llm(penalized, generation_config="ignore")
    assert texts(ignoring.generate(PROMPTS, SHORT)) == raw
    sampled = SamplingParams(1.0, seed=3, max_tokens=8)
    with pytest.raises(ValueError, match=r"typical_p=0.9 of .*serve raw logits \(generation_config=ignore\)"):
        llm(penalized, None).generate("abc", sampled)
    assert texts(ignoring.generate("abc", sampled)) == texts(plain.generate("abc", sampled))


def test_samples_are_those_of_plain_decoding_in_trees_too(tiny_folder: Path, plain: LLM) -> None:
    params = [SamplingParams(1.0, top_k=k, top_p=0.95, seed=seed, max_tokens=20) for seed, k in enumerate((0, 3, 9))]
    trees = llm(tiny_folder, shape=TreeShape(3, 2, mode="sampled"))
    found = texts(trees.generate(["abc"] * 3, params))
    assert found == texts(plain.generate(["abc"] * 3, params)) and len(set(map(tuple, found))) == 3
    again = trees.generate("abc", params[1])
    assert texts(again) == [found[1]]  # whatever else is served, and where


@pytest.mark.parametrize("drafter", ["drafted", "plain"])
def test_copies_of_a_prompt_are_sampled_apart(drafter: str, request: pytest.FixtureRequest) -> None:
    served, params = request.getfixturevalue(drafter), SamplingParams(1.0, max_tokens=16)
    completions = served.generate(["abc"] * 3, params) + served.generate("abc", params)
    assert len(set(map(tuple, texts(completions)))) == 4
    assert params.seed is None and len({done.request.sampling_params.seed for done in completions}) == 4
    for done in completions[:2]:  # each knows what it was drawn with
        assert texts(served.generate("abc", done.request.sampling_params)) == texts([done])
        if done.trajectory is not None:
            assert int(done.trajectory["sampling", "seed"]) == done.request.sampling_params.seed
    seeded = replace(params, seed=7)
    assert len(set(map(tuple, texts(served.generate(["abc"] * 3, seeded))))) == 1


def test_a_drafter_in_the_target_s_place_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    save_drafter(llm(tiny_folder, "medusa").drafter, tmp_path / "mine")
    with pytest.raises(
        ModelError, match=r"mine': the folder holds a drafter \(MedusaDrafter\); give it as drafter, and as model the"
    ):
        llm(tmp_path / "mine")


def test_a_prompt_may_have_several_completions(drafted: LLM) -> None:
    params = SamplingParams(1.0, seed=7, n=3, max_tokens=16)
    found = drafted.generate(["abc", "x"], [params, replace(params, n=1)])
    alone = [drafted.generate("abc", replace(params, n=1, seed=seed))[0] for seed in (7, 8, 9)]
    assert texts(found[:3]) == texts(alone) and len(set(map(tuple, texts(found[:3])))) == 3
    assert texts(found[3:]) == texts(drafted.generate("x", replace(params, n=1)))
    ended = [chunk for chunk in drafted.stream("abc", params) if chunk.completion is not None]
    assert {chunk.index: chunk.completion.tokens.tolist() for chunk in ended} == dict(enumerate(texts(alone)))
    assert len(set(map(tuple, texts(drafted.generate("abc", replace(params, seed=None)))))) == 3


def test_seeds_of_64_bits_have_a_text_each(drafted: LLM) -> None:
    seeded = [SamplingParams(1.0, seed=seed, max_tokens=16) for seed in (-(2**63), -1, 0, 2**63 - 1)]
    found = drafted.generate(["abc"] * 4, seeded)
    assert len(set(map(tuple, texts(found)))) == 4 and texts(drafted.generate(["abc"] * 4, seeded)) == texts(found)
    assert [int(done.trajectory["sampling", "seed"]) for done in found] == [each.seed for each in seeded]


def test_the_seed_decides_what_is_sampled_without_one(tiny_folder: Path) -> None:
    params = SamplingParams(1.0, max_tokens=16)
    first, same, reseeded = (
        texts(llm(tiny_folder, None, seed=n).generate(["abc"] * 2, params)) for n in (3, np.int64(3), 4)
    )
    assert first == same and len(set(map(tuple, [*first, *reseeded]))) == 4


def test_a_path_is_a_folder_even_if_a_drafter_has_its_name(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = llm(tiny_folder, "medusa")
    assert isinstance(saved.drafter, Drafter)
    saved.drafter.save_pretrained(tmp_path / "eagle3")
    monkeypatch.chdir(tmp_path)
    assert type(llm(tiny_folder, Path("eagle3")).drafter) is type(saved.drafter) is not type(llm(tiny_folder).drafter)


def test_a_text_goes_on_after_its_end_where_it_is_asked_to(
    drafted: LLM, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    (truth,) = texts(plain.generate("Once upon", replace(SHORT, ignore_eos=True)))
    for served in (plain, drafted):
        monkeypatch.setattr(served._decoder.env, "_stop_tokens", torch.tensor([truth[3]]))
        ended, whole = served.generate(["Once upon"] * 2, [SHORT, replace(SHORT, ignore_eos=True)])
        assert ended.finish_reason == "stop" and ended.tokens.tolist() == truth[: truth.index(truth[3]) + 1]
        assert whole.finish_reason == "length" and whole.tokens.tolist() == truth and len(truth) == 24


@pytest.mark.parametrize("prompt", ["one", [4, 5], torch.tensor([4, 5]), CHAT])
def test_one_prompt_is_a_list_of_one(plain: LLM, prompt: object) -> None:
    assert len(plain.generate(prompt, SHORT)) == 1


def test_nothing_asked_is_nothing_answered(plain: LLM) -> None:
    assert plain.generate([]) == [] and list(plain.stream([])) == []


@pytest.mark.parametrize(("settings", "looks_up"), [({}, True), ({"shape": TreeShape(4)}, False)])
def test_an_untrained_drafter_is_helped_by_lookup(tiny_folder: Path, settings: dict, looks_up: bool) -> None:
    served = llm(tiny_folder, record=True, num_slots=1, **settings)
    (done,) = served.generate([[5, 6, 7, 8, 9] * 6], SHORT)
    # Nodes that were only looked up have no chance by the drafter.
    assert bool(done.trajectory["nodes", "log_probs"].isneginf().any()) == looks_up


def test_acceptance_is_what_was_recorded(drafted: LLM) -> None:
    for completion in drafted.generate(PROMPTS, SHORT):
        assert completion.trajectory is not None
        rounds, tokens = completion.trajectory["rounds"], completion.trajectory["sequence", "tokens"]
        delivered = rounds["anchor"].diff(append=torch.tensor([len(tokens) - 1]))
        drafted = rounds["offset"].diff() > 0  # a round in which the drafter still reads the prompt may have no draft
        assert drafted.sum() > len(drafted) / 2
        assert completion.acceptance_length == pytest.approx(float(delivered[drafted].double().mean()))


def test_a_prompt_that_cannot_be_served_is_told_before_any_is(drafted: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = [
        ([], "the prompt is empty; give at least one token"),
        ([1, 300], r"the prompt's tokens must lie in 0\.\.299"),
        ("x" * 600, "a prompt of 600 tokens and 24 new ones exceed the context of 512"),
        ([*CHAT, 5], r"messages\[1\] is 5; give an object with 'role' and 'content'"),
        ({"prompt_token_ids": [1]}, "an object with 'prompt_token_ids' is no prompt; give the ids themselves"),
        *(
            (prompt, "it is .*; give a text, a list of token ids")
            for prompt in (None, [1.5, 2.0], [[1, 2]], ["a"], {}, 5)
        ),
    ]
    expected = texts(drafted.generate("good", SHORT))
    with monkeypatch.context() as patch:
        patch.setattr(SpecDecodeEnv, "_round", lambda *_: pytest.fail("a round was decoded"))
        for prompt, message in bad:
            for served in (drafted.generate, drafted.stream):
                with pytest.raises(ValueError, match=f"^prompt 1 cannot be served: .*{message}"):
                    served(["good", prompt], SHORT)
    assert texts(drafted.generate("good", SHORT)) == expected


def test_parameters_are_one_or_as_many_as_the_prompts(plain: LLM) -> None:
    with pytest.raises(ValueError, match="there are 2 prompts and 3 SamplingParams; give one, or as many"):
        plain.generate(["a", "b"], [SHORT] * 3)
    lengths = [len(t) for t in texts(plain.generate(["a", "b"], [SamplingParams(max_tokens=n) for n in (3, 5)]))]
    assert lengths == [3, 5]
    by_name = plain.generate(prompts="a", sampling_params=SamplingParams(max_tokens=3))
    assert [done.text for done in by_name] == [
        "".join(chunk.text for chunk in plain.stream(prompts="a", sampling_params=SamplingParams(max_tokens=3)))
    ]


@pytest.mark.parametrize("method", [LLM, LLM.generate, LLM.stream, LLM.learn])
def test_help_shows_public_names(method: Any) -> None:
    assert " _" not in str(inspect.signature(method)).replace("'", " ")


def test_chunks_make_up_the_completions(drafted: LLM) -> None:
    params = replace(SHORT, temperature=1.0, seed=0)  # random bytes, many of them parts of characters
    chunks = list(drafted.stream(PROMPTS, params))
    completions = drafted.generate(PROMPTS, params)
    assert sum(len(chunk.tokens) > 1 for chunk in chunks) + len(completions) < len(chunks)
    for index, completion in enumerate(completions):
        own = [chunk for chunk in chunks if chunk.index == index]
        assert [token for chunk in own for token in chunk.tokens] == completion.tokens.tolist()
        assert "".join(chunk.text for chunk in own) == completion.text
        assert [chunk.completion is not None for chunk in own] == [False] * (len(own) - 1) + [True]
        assert own[-1].completion.text == completion.text


def test_a_stop_string_ends_the_text_before_it(drafted: LLM) -> None:
    # Random texts of single bytes, so that most are no whole characters.
    found = [
        (p, c.text, re.search(r"[ -~]{3}", c.text))
        for p, c in zip(PROMPTS, drafted.generate(PROMPTS, SHORT), strict=True)
    ]
    prompt, text, stop = next(each for each in found if each[2])
    params = replace(SHORT, stop=("never there", stop[0]))
    (cut,) = drafted.generate([prompt], params)
    assert cut.finish_reason == "stop" and cut.text == text[: stop.start()]
    assert "".join(chunk.text for chunk in drafted.stream([prompt], params)) == cut.text


def test_a_stop_string_across_a_special_token_ends_text_and_chunks(drafted: LLM) -> None:
    """A special token is no part of the text, so that a stop string may lie on both sides of it."""
    tokenizer, found = drafted.tokenizer, []
    params = [SamplingParams(temperature=1.0, max_tokens=60, seed=seed) for seed in range(12, 24)]
    for done, wanted in zip(drafted.generate(["x"] * len(params), params), params, strict=True):
        written = [tokenizer.decode([token], skip_special_tokens=True) for token in done.tokens.tolist()]
        for before, special, after in zip(written, done.tokens[1:].tolist(), written[2:], strict=False):
            if special in tokenizer.all_special_ids and re.fullmatch("[ -~]{2}", stop := before + after):
                found.append((done.text, replace(wanted, stop=stop)))
    assert found
    for whole, wanted in found[:3]:
        (cut,) = drafted.generate("x", wanted)
        assert cut.finish_reason == "stop" and cut.text == whole[: whole.index(wanted.stop[0])]
        assert "".join(chunk.text for chunk in drafted.stream("x", wanted)) == cut.text


def test_a_stream_that_is_left_drops_its_requests(drafted: LLM) -> None:
    expected = texts(drafted.generate("good", SHORT))
    stream = drafted.stream(PROMPTS, SHORT)
    next(stream)
    with pytest.raises(
        RuntimeError, match=r"a stream of this LLM is still open, or .*; read it to its end, or close\(\) it"
    ):
        drafted.generate("good", SHORT)
    stream.close()
    assert texts(drafted.generate("good", SHORT)) == expected


def test_a_leading_tilde_is_the_home_folder(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny_folder)
    served = llm(Path("~/model"))
    served.drafter.save_pretrained("~/mine")
    assert (tmp_path / "mine" / "config.json").is_file() and not (tmp_path / "~").exists()
    for folder in ("~/mine", Path("~/mine")):
        assert isinstance(LLM("~/model", drafter=folder, dtype="float64", device="cpu").drafter, Eagle3Drafter)
    assert isinstance(Drafter.from_pretrained("~/mine", "~/model", trained_for="any"), Eagle3Drafter)
    with pytest.raises(ValueError, match="the folder holds a drafter"):
        LLM("~/mine", device="cpu")
    with pytest.raises(ValueError, match=rf"run='{tmp_path}/run' is not the folder of a finished run"):
        served.drafter.push_to_hub("owner/name", run="~/run")


def test_a_drafter_comes_by_name_by_folder_or_as_it_is(tiny_folder: Path, tmp_path: Path, plain: LLM) -> None:
    model, _ = load_target(tiny_folder, dtype=torch.float64, device="cpu")
    own = Eagle3Drafter.from_target(TargetParts.of(model), draft_vocab=torch.arange(50))
    save_drafter(own, tmp_path / "saved")
    expected = texts(plain.generate(PROMPTS, SHORT))
    for drafter, rows in (("eagle3", 300), (str(tmp_path / "saved"), 50), (tmp_path / "saved", 50), (own, 50)):
        served = llm(tiny_folder, drafter)
        assert len(served.drafter.draft_vocab) == rows
        assert texts(served.generate(PROMPTS, SHORT)) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; give auto, float32"),
        ({"dtype": "double precision"}, "dtype is 'double precision'; give auto, float32"),
        ({"drafter": "medusa", "num_speculative_tokens": 9}, "the trees are 9 deep, and this drafter drafts [0-9]+ "),
        (
            {"drafter": "medusa", "shape": TreeShape(9)},
            "shape: the trees are 9 deep, and this drafter drafts 4 tokens at most",
        ),
        ({"num_speculative_tokens": 100}, "num_speculative_tokens: trees have up to 100 nodes, and at most 64 can be"),
        (
            {"drafter": "ngram", "shape": TreeShape(3, 2, mode="sampled")},
            "shape: NgramDrafter drafts in mode topk, got 'sampled'",
        ),
        ({"drafter": "eagel3"}, "no drafter is called 'eagel3'; did you mean 'eagle3'"),
        ({"drafter": "/no/such/folder"}, "/no/such/folder"),
        ({"generation_config": "vllm"}, "generation_config is 'vllm'; give 'auto' or 'ignore'"),
        ({"adaptive": "no"}, "adaptive is 'no'; give True or False"),
        ({"record": 1}, "record is 1; give True or False"),
        ({"num_slots": 0}, "num_slots must be at least 1, got 0"),
        ({"max_length": 513}, r"max_length must lie in 2\.\.512"),
        ({"num_slots": 2.0}, "num_slots must be an integer, got 2.0"),
        ({"num_speculative_tokens": 2.5}, "num_speculative_tokens must be an integer, got 2.5"),
        ({"num_speculative_tokens": -1}, "num_speculative_tokens must be at least 0, got -1"),
        ({"seed": 2**63}, r"seed is 9223372036854775808; give an integer with 0 <= seed < 2\*\*63"),
        ({"seed": None}, "seed must be an integer, got None"),
        ({"shape": 4}, r"shape is 4; give a TreeShape, such as TreeShape\(depth=4, width=2\)"),
        ({"shape": TreeShape(4, 2, lookup=4), "drafter": None}, r"shape is TreeShape\(.*; name one, such as"),
        ({"dtype": None}, "dtype is None; give auto, float32"),
        ({"device": None}, "device='None' cannot be used here .*; try cpu, or auto"),
        ({"device": "meta:x"}, "device='meta:x' cannot be used here .*; try cpu, or auto"),
        ({"device": "meta"}, r"device='meta' cannot be used here \(Tensor.item.*; try cpu, or auto"),
        ({"drafter": Eagle3Drafter}, "drafter is a class, Eagle3Drafter; give a name such as 'eagle3', a folder"),
        ({"drafter": 3}, "drafter is a int; give a name such as 'eagle3', a folder"),
        ({"drafter": ""}, "no drafter is called ''"),
        ({"model": torch.nn.Linear(1, 1)}, "model is a Linear; give its name: 'smollm2', a folder or a hub id"),
    ],
)
def test_what_cannot_be_is_named(tiny_folder: Path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(**{"model": tiny_folder, "drafter": "eagle3", "device": "cpu", **settings})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_here_is_named(tiny_folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"device='cuda' cannot be used here \(Torch not compiled .*; try cpu, or auto"
    ):
        LLM(tiny_folder, device="cuda")


def test_a_drafter_that_fails_ends_no_request(
    tiny_folder: Path, plain: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(Eagle3Drafter, "propose", broken)
    completions = llm(tiny_folder).generate(PROMPTS, SHORT)
    assert texts(completions) == texts(plain.generate(PROMPTS, SHORT)) and "out of order" in caplog.text


def test_an_engine_that_fails_leaves_a_model_that_serves(
    tiny_folder: Path, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, rounds = llm(tiny_folder), []
    round = SpecDecodeEnv._round

    def failing(*arguments: object) -> None:
        rounds.append(1)
        if len(rounds) == 3:
            raise MemoryError("no room")
        round(*arguments)

    monkeypatch.setattr(SpecDecodeEnv, "_round", failing)
    with pytest.raises(MemoryError, match="no room"):
        served.generate(PROMPTS, SHORT)
    assert texts(served.generate(PROMPTS, SHORT)) == texts(plain.generate(PROMPTS, SHORT))


@pytest.mark.smollm2
def test_the_embedded_model_counts(smollm2_path: Path) -> None:
    served = LLM(smollm2_path, drafter="ngram", dtype="float32", max_length=256)
    chat = [{"role": "user", "content": "Repeat after me: one two three one two three one two three"}]
    (completion,) = served.generate(chat, SamplingParams(max_tokens=24))
    assert [completion.tokens.tolist()] == by_transformers(smollm2_path, [chat], 24, torch.float32)
    assert "".join(chunk.text for chunk in served.stream(chat, SamplingParams(max_tokens=24))) == completion.text
    assert "<|" not in completion.text and completion.acceptance_length > 1.2


def test_a_drafter_of_another_target_is_refused(tiny_folder: Path) -> None:
    parts = TargetParts.of(tiny_target())
    stranger = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(16))
    with pytest.raises(ValueError, match="the drafter is for a target of|is trained for the target weights"):
        LLM(tiny_folder, drafter=stranger, device="cpu")


def test_a_drafter_of_the_target_in_another_dtype_is_refused_by_that_reason(tiny_folder: Path) -> None:
    parts = TargetParts.of(load_target(tiny_folder, dtype=torch.float32, device="cpu")[0])
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(16))
    with pytest.raises(ValueError, match="in torch.float16; .* load it in the dtype that the drafter was started from"):
        LLM(tiny_folder, drafter=drafter, dtype="float16", device="cpu")
    drafter.trained_for = None
    LLM(tiny_folder, drafter=drafter, dtype="float16", device="cpu")


@pytest.mark.parametrize("name", ["ngram", "standalone"])
def test_a_drafter_that_serves_other_targets_is_taken(tiny_folder: Path, name: str) -> None:
    model, _ = load_target(tiny_folder, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    drafter = get_drafter(name).from_target(TargetParts.of(model), draft_vocab=torch.arange(16))
    LLM(tiny_folder, drafter=drafter, dtype="float32", device="cpu")
