"""The live page: what it serves to whom, and what it shows in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import httpx
import openai
import pytest
from chromium import Page, chromium
from run_events import gate, status, swap, train, verdict, watchdog

from aurora_rl.serving.http.live_page import FILES
from aurora_rl.telemetry.history import RunHistory
from aurora_rl.telemetry.log import MetricsLog, MetricsReader
from aurora_rl.telemetry.view import LiveView


@pytest.fixture(scope="module")
def view(rig: Any) -> LiveView:
    """What follows the engine's events, as the command line does."""
    reader = MetricsReader(rig.log.path, from_now=True)
    return LiveView(rig.server, rig.log, reader, rig.history, traffic=None, learner=lambda: "running")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture
def page(browser: Page) -> Page:
    browser.fetched.clear()
    browser.complaints.clear()
    return browser


# ---- what is served -------------------------------------------------------------------------------------------------


def test_the_page_is_whole_and_names_no_other_host(rig: Any) -> None:
    answers = {path: httpx.get(rig.url + path) for path in FILES}
    assert {answer.status_code for answer in answers.values()} == {200}
    for path, answer in answers.items():
        assert answer.headers["content-security-policy"].startswith("default-src 'self';")
        assert answer.headers["content-type"].split(";")[0] == FILES[path][1]
        hosts = set(re.findall(r"https?://[\w.-]+", answer.text))
        assert hosts <= {"http://www.w3.org", "https://github.com"}, path  # a name space, and uPlot's own address
    linked = re.findall(r'(?:src|href)="([^"]+)"', answers["/"].text)
    assert {f"/{name}" for name in linked} == FILES.keys() - {"/"}


def test_the_library_has_its_licence_next_to_it() -> None:
    folder = files("aurora_rl.serving.http") / "page"
    assert "MIT License" in (folder / "uPlot.LICENSE").read_text()
    assert {path.name for path in folder.iterdir()} == {name for name, _ in FILES.values()} | {"uPlot.LICENSE"}


def test_figures_need_a_key_and_the_page_does_not(rig: Any) -> None:
    url = rig.serve(api_keys=["sesame"])
    for path in FILES:
        assert httpx.get(url + path).status_code == 200
    for path in ("/history", "/page", "/page/other", "//", "/v1/models"):
        assert httpx.get(url + path).status_code == 401, path
    answer = httpx.get(f"{url}/history", headers={"Authorization": "Bearer sesame"})
    assert answer.status_code == 200 and answer.headers["cache-control"] == "no-store"


def test_figures_are_those_of_the_engine(rig: Any, client: openai.OpenAI, view: LiveView) -> None:
    before = httpx.get(f"{rig.url}/history").json()
    assert before["model"] == "tiny/model"
    client.completions.create(model="tiny/model", prompt="Once", max_tokens=4)
    assert rig.idle()
    view.follow()
    after = httpx.get(f"{rig.url}/history").json()
    assert (after["num_running"], after["num_waiting"]) == (0, 0)
    assert after["requests"] == before["requests"] + 1


# ---- what a browser shows -------------------------------------------------------------------------------------------


def test_the_page_shows_live_values_and_fetches_nothing_from_elsewhere(
    rig: Any, client: openai.OpenAI, view: LiveView, page: Page
) -> None:
    page.open(f"{rig.url}/")
    page.wait_for("document.getElementById('connection').innerText === 'live'")
    assert page.text("model") == "tiny/model"
    assert "No plain rounds in the last quarter" in page.text("speedup-text")
    assert "No candidate was judged yet." in page.text("run") and "No weights were swapped yet." in page.text("run")
    before = int(page.text("requests"))

    client.completions.create(model="tiny/model", prompt="Once", max_tokens=8)
    assert rig.idle()
    view.log_status()
    log = MetricsLog(rig.log.path, "learner")
    for event in (train(), gate(), verdict(version=6), watchdog(), swap(before + 1, version=7)):
        log.write(**{name: value for name, value in event.items() if name != "time"})
    view.follow()
    page.wait_for(f"document.getElementById('requests').innerText === '{before + 1}'")
    assert float(page.text("acceptance")) >= 1
    assert "%" in page.text("drafted")
    assert page.evaluate("document.querySelectorAll('#acceptance-chart canvas').length") == 1
    assert page.text("acceptance-text").endswith(" now.")
    assert page.text("version") == "7"
    assert page.text("learner-state") == "State: running" and page.text("loss") == "1.234"
    assert page.evaluate("[...document.querySelector('#gates tbody').rows[0].cells].map((c) => c.innerText)") == [
        str(before + 1), "+0.071", "+0.010 to +0.130", "published as 1"
    ]  # fmt: skip
    assert page.evaluate("[...document.querySelector('#verdicts tbody').rows[0].cells].map((c) => c.innerText)") == [
        "6", "40", "2.00 → 2.50", "30.0 → 35.0", "rolled back: acceptance length fell"
    ]  # fmt: skip
    assert page.evaluate("[...document.querySelector('#faults tbody').rows[0].cells].map((c) => c.innerText)") == [
        "1", "40", "corrupted", "tensor 'fc.weight' is all zero", "its weights were loaded again"
    ]  # fmt: skip
    assert page.text("on-trial") == "No weights are on trial now."
    (version, first, _, took) = page.evaluate(
        "[...document.querySelector('#swaps tbody').rows[0].cells].map((c) => c.innerText)"
    )
    assert (version, first, took) == ("7", str(before + 1), "2.5 ms")

    page.evaluate("document.querySelector('input[value=requests]').click()")
    page.wait_for("document.querySelectorAll('#acceptance-chart canvas').length === 1")
    assert page.evaluate("[...document.querySelectorAll('.u-legend')].some((l) => l.innerText.includes('requests'))")
    assert page.complaints == []
    assert len(page.fetched) > len(FILES)
    assert {httpx.URL(url).copy_with(path="/") for url in page.fetched} == {httpx.URL(f"{rig.url}/")}


def test_the_policy_of_the_page_refuses_other_hosts(rig: Any, page: Page) -> None:
    page.open(f"{rig.url}/")
    page.evaluate("fetch('http://127.0.0.2:9/').catch(() => { document.title = 'refused' })")
    page.wait_for("document.title === 'refused'")
    assert any("Content Security Policy" in complaint for complaint in page.complaints)


def test_the_page_asks_for_a_key(rig: Any, page: Page) -> None:
    url = rig.serve(api_keys=["sesame"])
    page.open(f"{url}/")
    for key, said in (("wrong", "this key is not known to the server"), (" sesame ", "live")):
        page.wait_for("!document.getElementById('key-form').hidden")
        assert page.evaluate("document.getElementById('run').hidden")
        assert page.evaluate("document.activeElement.id") == "key"
        page.call("Input.insertText", text=key)
        page.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", text="\r")
        page.wait_for(f"document.getElementById('connection').innerText === '{said}'")
    assert page.text("model") == "tiny/model"
    page.open(f"{url}/#again")
    page.call("Page.reload")
    page.wait_for("document.getElementById('connection')?.innerText === 'live'")  # the tab has kept the key


def test_the_page_says_when_the_server_is_gone(rig: Any, page: Page) -> None:
    url = rig.serve()
    page.open(f"{url}/")
    page.wait_for("document.getElementById('connection').innerText === 'live'")
    rig.stop(url)
    page.wait_for("document.getElementById('connection').innerText === 'the server does not answer'")


def test_a_server_that_started_anew_has_no_old_curves(rig: Any, page: Page) -> None:
    history = RunHistory()
    history.follow(status(5))
    page.open(f"{rig.serve(history=history)}/")
    page.wait_for("document.querySelectorAll('.chart canvas').length === 2")
    history.points.clear()
    page.wait_for("document.querySelectorAll('.chart canvas').length === 0")
    history.follow(status(1))
    page.wait_for("document.querySelectorAll('.chart canvas').length === 2")
    assert page.complaints == []


@pytest.mark.parametrize(
    ("rounds", "speculative", "figure", "said"),
    [
        (32, 15.0, "too short", "The baseline windows are too short: 32 of 96 plain rounds."),
        (120, None, "–", "No speculative rounds were measured."),
        (0, 15.0, "–", "No plain rounds in the last quarter: no baseline window there, or baseline.share=0."),
    ],
)
def test_the_page_says_why_there_is_no_speedup(
    rig: Any, page: Page, rounds: int, speculative: float | None, figure: str, said: str
) -> None:
    history = RunHistory()
    speed = {"baseline": 10.0 if rounds else None, "speculative": speculative}
    history.follow(status(5, tokens_per_second=speed, baseline_rounds=rounds))
    page.open(f"{rig.serve(history=history)}/")
    page.wait_for("document.getElementById('connection').innerText === 'live'")
    assert (page.text("speedup"), page.text("speedup-text")) == (figure, said)


def test_a_learner_elsewhere_has_its_figures_there(rig: Any, page: Page) -> None:
    history = RunHistory()
    history.follow(status(5, learner="any at tcp://127.0.0.1:5556"))
    page.open(f"{rig.serve(history=history)}/")
    page.wait_for("document.getElementById('connection').innerText === 'live'")
    said = "The learner runs elsewhere; its figures are in its own run folder."
    assert page.text("learner-state") == "State: any at tcp://127.0.0.1:5556"
    assert (page.text("elsewhere"), page.text("no-gates")) == (said, said)
    assert page.evaluate("document.getElementById('learner-figures').hidden")
    history.follow(status(6))
    page.wait_for("!document.getElementById('learner-figures').hidden")
    assert page.evaluate("document.getElementById('elsewhere').hidden")
    assert page.text("no-gates") == "No candidate was judged yet."


def test_an_error_of_drawing_is_not_blamed_on_the_server(rig: Any, page: Page) -> None:
    page.open(f"{rig.url}/")
    page.wait_for("document.getElementById('connection').innerText === 'live'")
    page.evaluate("document.getElementById('model').remove()")
    page.wait_for("document.getElementById('connection').innerText.includes('cannot be drawn')")
    assert any("TypeError" in complaint for complaint in page.complaints)


@pytest.mark.parametrize("width", [1200, 800, 360])
def test_words_of_the_tables_are_whole_and_the_page_is_as_wide_as_the_screen(rig: Any, page: Page, width: int) -> None:
    history = RunHistory()
    tensor = "tensor 'layers.0.self_attn.qkv_proj.weight' differs from what was published in 123456 of 4194304 values"
    action = "its weights were loaded again, and something changes them: restart SGLang on its drafter"
    for event in (
        status(40), gate(requests=40), swap(40), verdict(version=6),
        watchdog(detail=f"{tensor}, and 7 other tensors differ", action=action, cause="mismatched"),
    ):  # fmt: skip
        history.follow(event)
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=740, deviceScaleFactor=1, mobile=False)
    page.open(f"{rig.serve(history=history)}/")
    page.wait_for("document.querySelectorAll('table:not(.u-legend) td').length === 18")
    words, broken, narrowest = page.evaluate("""(() => {
        const free = "#faults td:nth-child(n + 4)";
        const words = [...document.querySelectorAll(`table:not(.u-legend) :is(th, td:not(${free}))`)]
            .flatMap(({ firstChild }) => [...firstChild.data.matchAll(/\\S+/g)].map((word) => {
                const range = document.createRange();
                range.setStart(firstChild, word.index);
                range.setEnd(firstChild, word.index + word[0].length);
                return [word[0], range.getClientRects().length];
            }));
        const widths = [...document.querySelectorAll(free)].map((cell) => cell.offsetWidth);
        return [words.length, words.filter(([, lines]) => lines !== 1).map(([word]) => word), Math.min(...widths)];
    })()""")
    assert words > 40 and broken == [] and narrowest > 150
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_page_fits_a_phone_and_a_dark_room(rig: Any, page: Page, view: LiveView) -> None:
    view.log_status()
    view.follow()

    def back() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    page.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=1, mobile=False)
    page.open(f"{rig.url}/")
    page.wait_for("document.querySelectorAll('#acceptance-chart canvas').length === 1")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    light = back()
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert (light, back()) == ("rgb(255, 255, 255)", "rgb(20, 23, 26)")
    headings = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map((h) => h.tagName).join(' ')")
    assert headings == "H1 H2 H2 H3 H3 H2 H2 H2 H2 H2"
