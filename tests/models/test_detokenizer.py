"""Text that arrives in pieces is the text of the whole, and says nothing that a later token takes back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from aurora_rl.models.detokenizer import Detokenizer, StopStrings, detokenize, token_bytes


@pytest.fixture(scope="module")
def of_bytes(tiny_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2_path)


@pytest.fixture(params=["of_bytes", pytest.param("smollm2", marks=pytest.mark.smollm2)], scope="module")
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return request.getfixturevalue(request.param)


def pieces(detokenizer: Detokenizer, tokens: Sequence[int], sizes: Sequence[int]) -> list[str]:
    """Feed tokens in updates of these sizes, again and again."""
    said, at, turn = [], 0, 0
    while at < len(tokens):
        size = sizes[turn % len(sizes)]
        said.append(detokenizer.feed(tokens[at : at + size]))
        at, turn = at + size, turn + 1
    return [*said, detokenizer.finish()]


sizes = st.lists(st.integers(1, 6), min_size=1, max_size=4)
texts = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("ab é€😀\u200d👩\n")), max_size=80)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_tokens_in_any_pieces_make_the_whole(tokenizer: PreTrainedTokenizerBase, data: st.DataObject) -> None:
    # Random ids: broken characters, special tokens, and ids that the tokenizer does not know.
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) + 5), max_size=80))
    said = pieces(Detokenizer(tokenizer), tokens, data.draw(sizes))
    assert "".join(said) == detokenize(tokenizer, tokens)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_texts_come_without_a_broken_character(tokenizer: PreTrainedTokenizerBase, data: st.DataObject) -> None:
    tokens = tokenizer(data.draw(texts), add_special_tokens=False)["input_ids"]
    said, whole = pieces(Detokenizer(tokenizer), tokens, data.draw(sizes)), detokenize(tokenizer, tokens)
    assert "".join(said) == whole
    if "\ufffd" not in whole:  # the embedded model has no token for some bytes
        assert not any("\ufffd" in piece for piece in said)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_stop_strings_cut_where_the_whole_text_is_cut(of_bytes: PreTrainedTokenizerBase, data: st.DataObject) -> None:
    text = data.draw(st.text(st.sampled_from("abé"), max_size=40))
    stop = data.draw(st.lists(st.text(st.sampled_from("abé"), min_size=1, max_size=5), max_size=3))
    tokens = of_bytes(text)["input_ids"]
    # An engine ends a completion at the token that completes a stop string.
    ended = (n for n in range(len(tokens)) if any(each in detokenize(of_bytes, tokens[:n]) for each in stop))
    tokens = tokens[: next(ended, len(tokens))]
    said = pieces(Detokenizer(of_bytes, stop), tokens, data.draw(sizes))
    assert "".join(said) == detokenize(of_bytes, tokens, stop)
    # Nothing waits that cannot be the beginning of a stop string.
    if not any(each in detokenize(of_bytes, tokens) for each in stop):
        held = len("".join(said[-1:]))
        assert held < max(map(len, stop), default=1)


def test_the_beginning_of_a_stop_string_waits_until_it_is_none(of_bytes: PreTrainedTokenizerBase) -> None:
    detokenizer = Detokenizer(of_bytes, ["###", "Q:"])
    said = [detokenizer.feed(of_bytes(each)["input_ids"]) for each in ["ab#", "#", "c", "Q", "#", "##", "late"]]
    assert said == ["ab", "", "##c", "", "Q", "", ""] and detokenizer.finish() == ""


def test_a_beginning_that_never_ends_is_said_at_last(of_bytes: PreTrainedTokenizerBase) -> None:
    detokenizer = Detokenizer(of_bytes, ["###"])
    assert detokenizer.feed(of_bytes("ab##")["input_ids"]) == "ab" and detokenizer.finish() == "##"


def test_bytes_that_are_no_text_do_not_pile_up(of_bytes: PreTrainedTokenizerBase) -> None:
    broken = of_bytes.convert_tokens_to_ids("ÿ")  # the byte 255, which no character holds
    detokenizer = Detokenizer(of_bytes)
    said = [detokenizer.feed([broken]) for _ in range(200)]
    assert len(detokenizer._window) <= 17
    assert "".join(said) + detokenizer.finish() == "\ufffd" * 200


def test_the_cost_of_a_token_does_not_grow(of_bytes: PreTrainedTokenizerBase) -> None:
    detokenizer, tokens = Detokenizer(of_bytes, ["never there"]), of_bytes("word " * 4000)["input_ids"]
    seconds = []
    for start in range(0, len(tokens), 2000):
        began = time.thread_time()
        for token in tokens[start : start + 2000]:
            detokenizer.feed([token])
        seconds.append(time.thread_time() - began)
    assert min(seconds[-3:]) < 3 * min(seconds[:3])


def test_tokens_have_their_bytes(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in ["caffé", "€ 5", "😀", "\ufffd"]:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        spelt = [token_bytes(tokenizer, token)[1] or [] for token in tokens]
        assert bytes(byte for each in spelt for byte in each) == text.encode()
    assert token_bytes(tokenizer, tokenizer.eos_token_id)[0] == tokenizer.eos_token


# ---- stop strings -----------------------------------------------------------------------------------------------

# Beginnings of words have a space, the single bytes make characters of up to four, and a token has none to three.
PIECES = ["<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁", "▁a", "▁bc", "a", "b", "cd", ".", "▁é", "😀"]
STRIP = decoders.Strip(" ", 1, 0)
SPELLING = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), STRIP])


def of_pieces(decoder: object, pieces: Sequence[str] = PIECES) -> PreTrainedTokenizerBase:
    backend = Tokenizer(models.WordLevel({piece: place for place, piece in enumerate(pieces)}, unk_token="<s>"))
    backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


KINDS = {
    "sentencepiece with bytes": lambda: of_pieces(SPELLING),
    "sentencepiece": lambda: of_pieces(decoders.Metaspace(), [PIECES[0], *PIECES[257:]]),
    "wordpiece": lambda: of_pieces(decoders.WordPiece(), ["<s>", "a", "##a", "##b", "bc", ".", "é", "n't", "😀"]),
    "ends of words": lambda: of_pieces(decoders.BPEDecoder("</w>"), ["<s>", "a", "b</w>", "é", "cd</w>", "</w>"]),
}


@pytest.mark.parametrize(
    ("kind", "pieces", "texts"),
    [
        ("sentencepiece with bytes", ["▁a", "▁bc", "b", "▁", "▁a"], [" a", " bc", "b", " ", " a"]),
        ("sentencepiece", ["▁a", "▁bc", "b", "▁a"], [" a", " bc", "b", " a"]),
    ],
)
def test_a_token_keeps_the_space_that_begins_it(kind: str, pieces: list[str], texts: list[str]) -> None:
    tokenizer = KINDS[kind]()
    tokens = tokenizer.convert_tokens_to_ids(pieces)
    spelt = [token_bytes(tokenizer, token) for token in tokens]
    assert [text for text, _ in spelt] == texts
    assert bytes(byte for _, each in spelt for byte in each or []).decode() == " " + detokenize(tokenizer, tokens)
    assert token_bytes(tokenizer, 0) == ("<s>", list(b"<s>"))
    if kind == "sentencepiece with bytes":
        assert token_bytes(tokenizer, tokenizer.convert_tokens_to_ids("<0xE2>")) == ("\ufffd", [0xE2])


@pytest.fixture(params=["of_bytes", *KINDS, pytest.param("smollm2", marks=pytest.mark.smollm2)], scope="module")
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return KINDS[request.param]() if request.param in KINDS else request.getfixturevalue(request.param)


def end_by_the_whole_text(tokenizer: PreTrainedTokenizerBase, tokens: list[int], stop: list[str]) -> int | None:
    texts = ((count, detokenize(tokenizer, tokens[:count])) for count in range(1, len(tokens) + 1))
    return next((count for count, text in texts if any(each in text for each in stop)), None)


def end_by_the_last_tokens(tokenizer: PreTrainedTokenizerBase, tokens: list[int], stop: list[str]) -> int | None:
    stops = StopStrings(lambda window: detokenize(tokenizer, window), stop)
    return next((count for count, token in enumerate(tokens, 1) if stops.feed(token)), None)


def has_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    return len(tokenizer) == len(PIECES)


def ids(tokenizer: PreTrainedTokenizerBase) -> st.SearchStrategy[list[int]]:
    """Tokens of a vocabulary at random; of single bytes mostly whole characters, next to words."""
    parts = st.integers(0, len(tokenizer) - 1).map(lambda token: [token])
    if has_bytes(tokenizer):
        words = st.integers(257, len(tokenizer) - 1).map(lambda token: [token])
        spelt = st.characters(exclude_categories=["Cs"]).map(lambda c: [f"<0x{byte:02X}>" for byte in c.encode()])
        parts = st.one_of(words, words, spelt.map(tokenizer.convert_tokens_to_ids), parts)
    return st.lists(parts, min_size=20, max_size=70).map(lambda parts: [token for part in parts for token in part])


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_stop_strings_are_found_at_the_token_that_completes_them(
    any_tokenizer: PreTrainedTokenizerBase, data: st.DataObject
) -> None:
    tokens = data.draw(ids(any_tokenizer))
    text = detokenize(any_tokenizer, tokens) or "a"
    ends = data.draw(st.lists(st.tuples(st.integers(1, len(text)), st.integers(1, 12)), min_size=1, max_size=2))
    stop = [text[max(end - length, 0) : end] for end, length in ends]
    if has_bytes(any_tokenizer):  # a broken character breaks those next to it, however many these are
        stop = [each.replace("\ufffd", "a") for each in stop]
    assert end_by_the_last_tokens(any_tokenizer, tokens, stop) == end_by_the_whole_text(any_tokenizer, tokens, stop)


def test_a_stop_string_that_never_comes_costs_the_same_at_every_token(any_tokenizer: PreTrainedTokenizerBase) -> None:
    decoded: list[int] = []

    def counted(tokens: list[int]) -> str:
        decoded.append(len(tokens))
        return detokenize(any_tokenizer, tokens)

    stops = StopStrings(counted, ["never there"])
    tokens = [token for token in any_tokenizer.convert_tokens_to_ids(["a", "▁a", "cd", "Ġthe", "Ġ", "."]) if token]
    assert not any(stops.feed(token) for token in tokens * 200)
    assert max(decoded) < 50 and len(decoded) < 2 * 200 * len(tokens)
