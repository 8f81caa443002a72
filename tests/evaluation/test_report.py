"""The report, as a file and in a browser."""

from __future__ import annotations

import base64
import io
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lowbit.evaluation.comparison import Comparison, Plan, compare
from lowbit.evaluation.gates import parse_gate
from lowbit.evaluation.recording import Side, Task
from lowbit.evaluation.report import data_uri, render_report, show, write_report
from lowbit.inputs.data import OmniDiffusionSamplingParams

HOSTILE = 'a red circle <script>alert(1)</script><img src="https://example.com/x.png">'


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    plan = Plan(
        reference=Side(name="reference", device="cpu"),
        candidate=Side(name="candidate", device="cpu", quantization_config="int8"),
        task=Task(prompts=("a blue star", HOSTILE), params=OmniDiffusionSamplingParams(num_inference_steps=2)),
        teacher_forced=True,
        layers=True,
        gate=parse_gate("psnr_db>=20,mae<=1e-9"),
    )
    return compare(plan, tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def report(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(comparison, path)
    return path


class _Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_it_needs_nothing_from_elsewhere_and_escapes_prompts(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    elements = _Elements()
    elements.feed(text)
    for tag, attributes in elements.found:
        assert tag not in {"link", "iframe", "object", "base"}
        for name in ("src", "href", "action", "data"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    assert sum(tag == "script" for tag, _ in elements.found) == 1
    assert "&lt;script&gt;alert(1)" in text
    assert "url(" not in text


def test_the_pictures_are_the_recorded_ones(comparison: Comparison, report: Path) -> None:
    found = re.findall(r'<img class="(?:first|second) small" src="data:image/png;base64,([^"]+)"', report.read_text())
    assert len(found) == 4
    for index, text in enumerate(found):
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
        side = (comparison.reference, comparison.candidate)[index % 2]
        assert np.array_equal(picture, side.case(index // 2)["pictures"][0].numpy())


def test_figures_for_people() -> None:
    assert show(float("inf")) == "∞"
    assert show(float("nan")) == show(None) == "undefined"
    assert show(12.345678) == "12.346"
    assert data_uri(np.zeros((2, 3, 3), np.uint8)).startswith("data:image/png;base64,")


def test_a_report_without_layers_gate_or_forcing(comparison: Comparison) -> None:
    cases = [
        {key: value for key, value in case.items() if key != "teacher_forced_trajectory"}
        for case in comparison.result["cases"]
    ]
    result = {key: value for key, value in comparison.result.items() if key != "layers"} | {"cases": cases}
    text = render_report(Comparison(result, [], comparison.reference, comparison.candidate))
    assert 'id="layers"' not in text
    assert 'id="gate"' not in text
    assert "teacher-forced" not in text.lower()


@pytest.fixture(scope="module")
def page_and_events(report: Path) -> Iterator[tuple[Any, list[str]]]:
    """The report in headless Chromium, and what it logged or asked the network for."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium (Debian: apt-get install chromium)")
    api = pytest.importorskip("playwright.sync_api")
    events: list[str] = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.on("console", lambda message: events.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: events.append(f"error: {error}"))
        page.on("request", lambda request: events.append(f"request: {request.url[:60]}"))
        page.goto(report.as_uri())
        yield page, events
        browser.close()


def test_the_browser_logs_nothing_and_asks_for_nothing(page_and_events: tuple[Any, list[str]], report: Path) -> None:
    page, events = page_and_events
    page.wait_for_timeout(300)
    assert [event for event in events if not event.startswith("request: data:")] == [f"request: {report.as_uri()}"[:69]]


def test_the_divider_moves_by_mouse_and_by_key(page_and_events: tuple[Any, list[str]]) -> None:
    page, _ = page_and_events
    divider = page.locator(".divider").first
    divider.scroll_into_view_if_needed()
    box = divider.bounding_box()

    def visible_width() -> float:
        clip = divider.locator(".clipped").evaluate("element => getComputedStyle(element).clipPath")
        hidden = re.fullmatch(r"inset\(0px calc\(100% - ([\d.]+)%\) 0px 0px\)|inset\(0px ([\d.]+)% 0px 0px\)", clip)
        assert hidden, clip
        return float(hidden[1]) if hidden[1] else 100 - float(hidden[2])

    assert visible_width() == 50
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, middle, steps=5)
    page.mouse.up()
    assert 72 < visible_width() < 88
    before = visible_width()
    divider.locator("input").press("ArrowLeft")
    assert visible_width() == before - 0.5
    assert "% reference" in divider.locator("input").get_attribute("aria-valuetext")


def test_the_divider_shows_the_reference_on_its_left(page_and_events: tuple[Any, list[str]]) -> None:
    page, _ = page_and_events
    under, clipped = (page.locator(f".divider img{kind}").first for kind in (":not(.clipped)", ".clipped"))
    first, second = (page.locator(f"img.{name}").first.get_attribute("src") for name in ("first", "second"))
    assert (clipped.get_attribute("src"), under.get_attribute("src")) == (first, second)


def test_the_difference_is_the_absolute_difference_amplified(
    page_and_events: tuple[Any, list[str]], comparison: Comparison
) -> None:
    page, _ = page_and_events
    page.locator("#amplify").evaluate("input => { input.value = 5; input.dispatchEvent(new Event('input')); }")
    assert page.locator("#amplify-value").inner_text().startswith("32")
    page.locator(".difference").first.evaluate(
        """element => {
            const copy = element.cloneNode(true);
            copy.id = "copy";
            copy.style.cssText = "position: fixed; left: 0; top: 0; width: 128px; z-index: 9; border-radius: 0";
            document.body.append(copy);
        }"""
    )
    clip = {"x": 0, "y": 0, "width": 128, "height": 128}
    shot = np.asarray(Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB"), dtype=float)
    page.locator("#copy").evaluate("element => element.remove()")
    first, second = (
        side.case(0)["pictures"][0].numpy().astype(float) for side in (comparison.reference, comparison.candidate)
    )
    expected = np.clip(np.abs(first - second) * 32, 0, 255)
    assert expected.max() > 0
    assert np.array_equal(shot, expected)


def test_the_charts_have_data_and_names(page_and_events: tuple[Any, list[str]]) -> None:
    page, _ = page_and_events
    charts = page.locator("svg[role=img]")
    assert charts.count() == 2
    for index in range(2):
        assert charts.nth(index).get_attribute("aria-label")
        assert charts.nth(index).locator("circle").count() >= 2
        box = charts.nth(index).locator("polyline").first.bounding_box()
        assert box["width"] > 100
    widths = [bar.bounding_box()["width"] for bar in page.locator("#layer-bars .bar div").all()]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 100
    assert page.locator("img:not([alt])").count() == 0


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (360, "dark"), (1400, "dark")])
def test_it_fits_any_screen_and_follows_the_colour_scheme(
    page_and_events: tuple[Any, list[str]], width: int, scheme: str
) -> None:
    page, _ = page_and_events
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    shade = int(re.findall(r"\d+", background)[0])
    assert shade < 64 if scheme == "dark" else shade > 192
