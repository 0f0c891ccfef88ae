from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from run_events import gate, request, status, swap

from aurora_rl.telemetry.history import RunHistory
from aurora_rl.telemetry.report import draw_report, summary_table, write_summary
from aurora_rl.telemetry.stats import Stats

EMPTY_SUMMARY = Stats().summary()
SUMMARY = {
    "requests": 40,
    "client_requests": 0,
    "failed": 1,
    "swaps": 2,
    "swap_ms": {"p50": 1.23456789, "max": 2.0},
    "acceptance_length": {"first": 1.0, "last": 1.9},
    "domains": {
        "": {"requests": 1, "tokens": 9, "acceptance_length": None},
        "chat": {"requests": 39, "tokens": 1000, "acceptance_length": 1.5},
    },
    "tokens_per_second": {"baseline": 100.0, "speculative": 150.0},
    "speedup": 1.5,
    "baseline_rounds": 320,
    "dropped_trajectories": 7,
    "dropped_by_reason": {},
    "drafter_faults": 0,
    "duration_s": 61.5,
    "versions_served": [0, 1, 2],
}


def render(summary: dict) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(summary_table(summary))
    console.file.close()
    return console.export_text()


def test_the_summary_has_the_promised_keys_and_rounded_numbers(tmp_path: Path) -> None:
    write_summary(tmp_path, SUMMARY)
    read = json.loads((tmp_path / "summary.json").read_text())
    assert read == {**SUMMARY, "swap_ms": {"p50": 1.2346, "max": 2.0}}
    assert list(read) == list(EMPTY_SUMMARY)
    assert {k: list(v) for k, v in EMPTY_SUMMARY.items() if isinstance(v, dict)} == {
        "swap_ms": ["p50", "max"],
        "acceptance_length": ["first", "last"],
        "domains": [],
        "tokens_per_second": ["baseline", "speculative"],
        "dropped_by_reason": [],
    }


def test_domains_have_a_row_where_there_are_any() -> None:
    assert "acceptance length by domain" in render(SUMMARY) and "none – · chat 1.50" in render(SUMMARY)
    assert "by domain" not in render(EMPTY_SUMMARY)


def test_dropped_trajectories_are_told_by_reason() -> None:
    assert "7 (no_learner 5, malformed 2)" in render(SUMMARY | {"dropped_by_reason": {"no_learner": 5, "malformed": 2}})
    assert "(" not in next(line for line in render(SUMMARY).splitlines() if "dropped trajectories" in line)


def test_clients_of_a_run_with_traffic_are_counted_apart() -> None:
    assert "40 (1 failed, 3 of clients)" in render(SUMMARY | {"client_requests": 3})
    assert "of clients" not in render(SUMMARY) + render(SUMMARY | {"client_requests": 40})


def test_what_was_not_measured_is_null_and_a_dash(tmp_path: Path) -> None:
    write_summary(tmp_path, EMPTY_SUMMARY)
    assert json.loads((tmp_path / "summary.json").read_text()) == EMPTY_SUMMARY
    text = render(EMPTY_SUMMARY)
    assert "0 (0 failed)" in text
    assert "– → –" in text


def test_the_table_shows_the_figures() -> None:
    text = render(SUMMARY)
    for shown in ("40 (1 failed)", "1.00 → 1.90", "100.0 · 150.0", "1.50", "2 (p50 1.2 ms, max 2.0 ms)", "62 s"):
        assert shown in text


def history_of(*events: dict) -> RunHistory:
    history = RunHistory()
    for event in events:
        history.follow(event)
    return history


def whole_run() -> RunHistory:
    """Forty requests of two domains, the second from the twentieth on; the speedup is too short in the first half."""
    requests = [request("code" if n < 20 else "$sql 値") for n in range(40)]
    events: list[dict] = []
    for n in range(0, 40, 5):
        short = {"baseline_rounds": 32, "speedup": None} if n < 20 else {}
        events += [*requests[n : n + 5], status(n + 5, drafted={"tree": n, "chain": 10}, **short)]
        events += [gate(serving=2.5), swap(n + 5)] if n in (10, 30) else []
    history = history_of(*events)
    history.marks += [(30, "unseen templates"), (40, "never reached")]
    return history


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[RunHistory], list[Axes]]:
    """Draws a report and returns its panels."""
    figures: list[Figure] = []
    save = Figure.savefig

    def noted(figure: Figure, *args: Any, **words: Any) -> None:
        figures.append(figure)
        save(figure, *args, **words)

    monkeypatch.setattr(Figure, "savefig", noted)

    def draw(history: RunHistory) -> list[Axes]:
        draw_report(tmp_path / "report.png", history)
        assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        return figures[-1].axes

    return draw


def lines(axis: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """The lines of a panel by label."""
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}


def texts(axis: Axes) -> list[str]:
    return [text.get_text() for text in axis.texts]


def test_the_report_shows_what_was_served_and_what_the_gate_replayed(drawn: Callable) -> None:
    acceptance, *_ = drawn(whole_run())
    served, replayed = "served, last tenth of the requests", "gate's replay"
    shown = lines(acceptance)
    assert shown[served] == ([5, 10, 15, 20, 25, 30, 35, 40], [2.0] * 8)
    assert shown[replayed] == ([15, 35], [2.5, 2.5])
    swaps = [
        line.get_xdata()[0] for line in acceptance.lines if line.get_color() == "#e69f00" and len(line.get_xdata())
    ]
    assert swaps == [15, 35]
    legend = [text.get_text() for text in acceptance.get_legend().get_texts()]
    assert legend == [served, BREAK_EVEN, replayed, "weights swapped"]


BREAK_EVEN = "break-even, last quarter"


def test_the_report_shows_the_acceptance_that_breaks_even(drawn: Callable) -> None:
    at = [status(5, break_even=None, speedup=None, baseline_rounds=32), status(9), status(12, break_even=1.5)]
    acceptance, *_ = drawn(history_of(*at))
    requests, lengths = lines(acceptance)[BREAK_EVEN]
    assert requests == [5, 9, 12] and math.isnan(lengths[0]) and lengths[1:] == [1.25, 1.5]
    acceptance, *_ = drawn(history_of(at[0]))  # not measured, hence no line and no word of it
    assert BREAK_EVEN not in lines(acceptance)


def test_the_first_request_without_a_domain_is_marked_in_words(drawn: Callable) -> None:
    acceptance, *_ = drawn(history_of(*[request("code")] * 5, request(), request("code"), status(7)))
    assert texts(acceptance) == ["requests without a domain"]


def test_the_report_marks_where_something_new_begins(drawn: Callable) -> None:
    acceptance, speed, *_ = drawn(whole_run())
    assert texts(acceptance) == [r"domain \$sql 値", "unseen templates"]
    for axis in (acceptance, speed):
        assert [line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == "--"] == [20, 30]


def test_a_speedup_over_too_few_plain_rounds_is_a_gap(drawn: Callable) -> None:
    _, speed, *_ = drawn(whole_run())
    (values,) = [values for _, values in lines(speed).values() if len(values) == 8]
    assert [math.isnan(value) for value in values] == [True] * 4 + [False] * 4
    assert texts(speed) == ["too short"]
    _, speed = drawn(history_of(request(), status(1, baseline_rounds=32, speedup=None, drafted={})))
    assert texts(speed) == ["too short\n32 of 96 plain rounds"]


def test_a_speedup_that_was_not_measured_is_not_called_too_short(drawn: Callable) -> None:
    plain = {"tokens_per_second": {"baseline": None, "speculative": 15.0}, "speedup": None, "baseline_rounds": 0}
    _, speed, _ = drawn(history_of(status(5), status(9, **plain)))
    assert texts(speed) == ["not measured"]
    only = {"tokens_per_second": {"baseline": 10.0, "speculative": None}, "speedup": None, "baseline_rounds": 120}
    _, speed, _ = drawn(history_of(status(5, **only)))
    assert texts(speed) == ["not measured"]


def test_without_plain_decoding_the_report_shows_tokens_per_second(drawn: Callable) -> None:
    never = {"tokens_per_second": {"baseline": None, "speculative": 15.0}, "speedup": None, "baseline_rounds": 0}
    _, speed, *_ = drawn(history_of(status(5, **never), status(9, **never)))
    assert speed.get_ylabel() == "tokens per second"
    assert speed.lines[0].get_ydata().tolist() == [15.0, 15.0]


def test_bands_say_what_was_drafted_and_bars_how_each_domain_went(drawn: Callable) -> None:
    _, _, drafted, domains = drawn(whole_run())
    labels = [text.get_text() for text in drafted.get_legend().get_texts()]
    assert labels == ["tree", "chain"]
    assert [bar.get_width() for bar in domains.patches] == [2.0, 2.0]
    assert [label.get_text() for label in domains.get_yticklabels()] == ["code", r"\$sql 値"]
    assert texts(domains) == [" 2.00 · 20 requests · 160 tokens"] * 2


def test_panels_without_content_are_left_out(drawn: Callable) -> None:
    assert len(drawn(history_of(request(), status(1)))) == 3  # no domains
    assert len(drawn(history_of(request(), status(1, drafted={})))) == 2  # as with SGLang
    never = {"tokens_per_second": {"baseline": None, "speculative": None}, "speedup": None, "baseline_rounds": 0}
    (acceptance,) = drawn(history_of(request(), status(1, drafted={}, **never)))  # as with an attached SGLang
    assert acceptance.get_xlabel() == "completed requests"
    assert len(drawn(RunHistory())) == 1


def test_half_a_picture_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(self: Figure, path: Path, **options: object) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", cut)
    with pytest.raises(OSError, match="No space left"):
        draw_report(tmp_path / "report.png", whole_run())
    assert list(tmp_path.iterdir()) == []


def test_requests_without_speculative_rounds_can_be_drawn(drawn: Callable) -> None:
    plain = [request("code", speculative=(0, 0)), status(1, acceptance_length=None, drafted={"plain": 8})]
    *_, domains = drawn(history_of(*plain))
    assert texts(domains) == [" – · 1 requests · 8 tokens"]
