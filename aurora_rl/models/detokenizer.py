"""Text of a completion, whole or while its tokens arrive."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

# The window of tokens that is decoded again with each new one begins anew when it is this long, with the last few.
_WINDOW, _CONTEXT = 16, 8


def detokenize(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], stop: Sequence[str] = ()) -> str:
    """Return the text of a completion's token ids, up to the first stop string, without special tokens."""
    text = str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return text[: _first(text, stop)]


def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> tuple[str, list[int] | None]:
    """Return the text of one token, special ones included, and its bytes: None if they are not known.

    A token may be a part of a character: its text is then the replacement character, and its bytes are that part. A
    space that it begins with is part of it, also where the tokenizer strips the space that a whole text begins with.
    """
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    twice = str(tokenizer.decode([token, token], clean_up_tokenization_spaces=False))
    if twice.startswith(text):  # a decoder that strips the beginning of a text leaves the second alone
        text = twice[len(text) :]
    if "\ufffd" not in text:
        return text, list(text.encode())
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if len(piece) == 6 and piece.startswith("<0x"):
        return text, [int(piece[3:5], 16)]
    if all(character in _BYTE_OF for character in piece):
        return text, [_BYTE_OF[character] for character in piece]
    return text, None


class Detokenizer:
    """Turn the tokens of one completion into text as they arrive.

    The pieces joined are the text of :func:`detokenize`. A character that the next token may complete waits, and so
    does the beginning of a stop string. Each token is decoded with a few before it only, so that its cost does not
    grow.

    Args:
        tokenizer: Tokenizer of the target.
        stop: Stop strings; the text ends before the first.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from transformers import AutoTokenizer
        >>> from aurora_rl.testing import tiny_folder
        >>> with TemporaryDirectory() as folder:
        ...     tokenizer = AutoTokenizer.from_pretrained(tiny_folder(folder))
        >>> detokenizer = Detokenizer(tokenizer, stop=["END"])
        >>> tokens = tokenizer("caffé ENDE")["input_ids"]
        >>> [detokenizer.feed([token]) for token in tokens[:8]], detokenizer.feed(tokens[8:]), detokenizer.finish()
        (['c', 'a', 'f', 'f', '', 'é', ' ', ''], '', '')
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._window: list[int] = []
        self._read = 0  # characters of the window's text that were taken
        self._held = ""  # taken, and perhaps the beginning of a stop string
        self._ended = False

    def feed(self, tokens: Sequence[int]) -> str:
        """Return the text that the next token ids make certain."""
        if self._ended or not tokens:
            return ""
        self._window += tokens
        text = detokenize(self._tokenizer, self._window)
        # Bytes that end within a character decode to replacement characters.
        whole = len(text.rstrip("\ufffd"))
        new = text[self._read : whole]
        self._read = max(self._read, whole)
        if len(self._window) > _WINDOW:
            new += self._shorten(text)
        return self._say(new, last=False)

    def finish(self) -> str:
        """Return what is left of the text."""
        if self._ended:
            return ""
        return self._say(detokenize(self._tokenizer, self._window)[self._read :], last=True)

    def _shorten(self, text: str) -> str:
        """Drop the head of the window, and return what is certain since then."""
        head, tail = self._window[:-_CONTEXT], self._window[-_CONTEXT:]
        rest = detokenize(self._tokenizer, tail)
        if self._read == len(text):  # nothing waits: the tail is context, whatever it looks like on its own
            self._window, self._read = tail, len(rest)
            return ""
        before = detokenize(self._tokenizer, head)
        if before + rest != text:  # a character stands across the cut, or the tail needs its context
            return ""
        new = before[self._read :]  # bytes that no further token turns into characters
        self._window, self._read = tail, max(self._read - len(before), 0)
        return new

    def _say(self, new: str, *, last: bool) -> str:
        text = self._held + new
        end = _first(text, self._stop)
        if end is not None or last:
            self._held, self._ended = "", True
            return text[:end]
        kept = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


class StopStrings:
    """Watch for stop strings in the text of one completion as its tokens arrive.

    With each token the last few are decoded again, as many as the longest stop string has characters and some more.
    Their text is the end of the whole, less at most the space that a tokenizer strips from the beginning of a text.

    Args:
        decode: Turns token ids into text.
        stop: Stop strings, at least one.

    Example:
        >>> stops = StopStrings(lambda tokens: "".join(map(chr, tokens)), ["END"])
        >>> [stops.feed(ord(character)) for character in "ENEND"]
        [False, False, False, False, True]
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str]) -> None:
        self._decode, self._stop = decode, tuple(stop)
        self._longest = max(map(len, stop))
        self._window: list[int] = []

    def feed(self, token: int) -> bool:
        """Return whether the text contains a stop string once it has this token."""
        self._window.append(token)
        text = self._decode(self._window)
        if any(each in text for each in self._stop):
            return True
        count = self._longest + _CONTEXT
        if len(self._window) >= 2 * count:
            self._shorten(text, self._window[-count:])
        return False

    def _shorten(self, text: str, tail: list[int]) -> None:
        """Make the tail the window, if no stop string that is still to come can begin before it."""
        rest = self._decode(tail)
        # A tail that begins within a character reads otherwise. At the end a character may wait for its last byte: in
        # vocabularies of single bytes ("<0xE2>") all those next to it are broken until then, and do not count.
        if text.endswith(rest) and len(rest.rstrip("\ufffd")) >= self._longest:
            self._window = tail


def _first(text: str, stop: Sequence[str]) -> int | None:
    """Return where the first of the strings begins in a text; None if none is there."""
    return min((place for place in map(text.find, stop) if place >= 0), default=None)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest proper beginning of a stop string that the text ends in."""
    longest = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in longest if text.endswith(stop[:length])), 0)


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character in which byte-level vocabularies write their tokens."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()
