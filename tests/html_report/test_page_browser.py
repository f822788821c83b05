"""The page and the SVG files in a real headless Chromium: they load, show, fit a phone and print."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from support.builds import Shared
from support.page_records import HOSTILE, compare_row, hostile_page, records

from edgeprune.html_report.files import compare_svg, staircase_svg
from edgeprune.html_report.page import page_of_bundle

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright here: pip install playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
    pytest.mark.timeout(300),
]
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
WIDE, PHONE = 1280, 390
INSIDE = """[...document.querySelectorAll('svg.chart')].flatMap(svg => {
    const box = svg.getBoundingClientRect();
    return [...svg.querySelectorAll('text, circle, rect')].filter(part => {
        const b = part.getBoundingClientRect();
        const across = b.left < box.left - 1 || b.right > box.right + 1;
        return across || b.top < box.top - 1 || b.bottom > box.bottom + 1;
    }).map(part => part.outerHTML);
})"""


class View:
    """A page shown in a window of its own, what it asked for and what went wrong."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.requests: list[str] = []
        self.wrong: list[tuple[str, str]] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("requestfailed", lambda request: self.wrong.append(("request", request.url)))
        page.on("console", lambda message: self.wrong.append(("console", message.text)))
        page.on("pageerror", lambda error: self.wrong.append(("error", error.message)))

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives."""
        return self.page.evaluate(expression)

    def picture(self, whole: bool = True) -> np.ndarray:
        """The whole page, or what fits the window (of an SVG file there is no other), (H, W, 3) bytes."""
        return np.asarray(Image.open(io.BytesIO(self.page.screenshot(full_page=whole))).convert("RGB"))

    @property
    def asked_for(self) -> set[str]:
        """Addresses that the page asked for, other than those it holds itself."""
        return {url for url in self.requests if not url.startswith("data:")}


Show = Callable[..., View]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all tests of this file."""
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield found
        found.close()


@pytest.fixture
def show(browser: Browser) -> Iterator[Show]:
    """show(path, width, scheme) loads a file in a window of this width."""
    contexts = []

    def load(path: Path, width: int, scheme: Any = "light") -> View:
        size: Any = {"width": width, "height": 900}
        contexts.append(browser.new_context(viewport=size, is_mobile=width == PHONE, color_scheme=scheme))
        view = View(contexts[-1].new_page())
        view.page.goto(path.as_uri(), wait_until="load")
        return view

    yield load
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def built(shared: Shared) -> Path:
    """The page of the measured build that test_build makes."""
    return page_of_bundle(shared.bundle)


@pytest.fixture(scope="module")
def page(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """page("built") is that of a real bundle, page("hostile") one whose every name tries to break out."""
    hostile = tmp_path_factory.mktemp("hostile") / "report.html"
    hostile.write_text(hostile_page())
    return {"built": built, "hostile": hostile}.__getitem__


@pytest.mark.parametrize("kind", ["built", "hostile"])
@pytest.mark.parametrize(("width", "scheme"), [(WIDE, "light"), (WIDE, "dark"), (PHONE, "light"), (PHONE, "dark")])
def test_loads_and_shows(show: Show, page: Callable[[str], Path], kind: str, width: int, scheme: str) -> None:
    view = show(page(kind), width, scheme)
    assert not view.wrong
    assert view.asked_for == {page(kind).as_uri()}
    assert view.page.title() != "broken"

    boxes = """[...document.querySelectorAll('svg.chart')].map(svg => {
        const box = svg.getBoundingClientRect();
        return [svg.ariaLabel, box.left, box.top, box.width, box.height].map(v => v.toFixed ? Math.round(v) : v);
    })"""
    charts = view.value(boxes)
    assert [name.partition(":")[0] for name, *_ in charts] == [
        "Staircase",
        "Tokens leaving each block",
        "Pareto front",
        "Predicted against measured latency",
    ]
    text = view.value(
        "Math.min(...[...document.querySelectorAll('text')].map(t => t.getBoundingClientRect().height))"
    )
    assert text >= 9  # px, on a phone too
    pictures = view.value("[...document.querySelectorAll('svg.picture')].map(s => s.clientWidth)")
    assert len(pictures) >= 4 and min(pictures) > 90
    assert view.value("document.documentElement.scrollWidth") <= width

    shot = view.picture()
    assert shot.shape[1] == width and len(shot) > 1200
    paper = shot[0, 0].mean()
    assert paper > 240 if scheme == "light" else paper < 40
    for _, left, top, wide, high in charts:
        assert 350 <= wide <= 560
        assert colours(shot[top : top + high, left : left + wide]) > 20
    end = view.value("document.querySelector('footer').offsetTop")
    for band in np.array_split(shot[: int(end)], 12):  # something is drawn all the way down
        assert colours(band) > 20


def colours(shot: np.ndarray) -> int:
    """How many a picture has: 1 where it is blank."""
    return len(np.unique(shot[::2] @ np.array([1 << 16, 1 << 8, 1])))


def test_what_a_page_does_wrong_is_seen(show: Show, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<script>console.error(1); nothing()</script><img src='missing.png' width=2000>")
    view = show(page, PHONE)
    assert {kind for kind, _ in view.wrong} == {"request", "console", "error"}
    assert len(view.asked_for) == 2
    assert view.value("document.documentElement.scrollWidth") > PHONE
    assert colours(view.picture()[300:600]) < 20


def test_texts_of_a_chart_stay_inside_it(show: Show, page: Callable[[str], Path]) -> None:
    for kind in ("built", "hostile"):
        for width in (WIDE, PHONE):
            assert show(page(kind), width).value(INSIDE) == []


def test_svg_files_show_whole_and_load_nothing(show: Show, tmp_path: Path) -> None:
    staircase, schedule = records("n" * 200)["staircase"], records()["schedule"]
    rows = [
        compare_row(method, policy, ms, agreement=100 - 70 / ms, top1=82 - 50 / ms)
        for method in ("fold", "tome", "pomt", "evit", "topk", "none")
        for policy in ("search", "published")
        for ms in (5.0, 7.0, 9.0)
    ]
    files = {"staircase": staircase_svg(staircase, schedule), "compare": compare_svg(rows)}
    for name, file in files.items():
        path = tmp_path / f"{name}.svg"
        path.write_bytes(file)
        view = show(path, 1500, "dark")
        assert not view.wrong and view.asked_for == {path.as_uri()}
        assert view.value(INSIDE) == []
        shot = view.picture(whole=False)[:480]
        assert shot[0, 0].mean() > 240 and colours(shot) > 20


def test_hostile_names_are_shown_as_text(show: Show, page: Callable[[str], Path]) -> None:
    view = show(page("hostile"), WIDE)
    assert HOSTILE in view.page.inner_text("body")
    assert view.value("document.querySelectorAll('script, iframe, [onerror], [onload]').length") == 0


def test_prints(show: Show, page: Callable[[str], Path]) -> None:
    view = show(page("built"), WIDE, "dark")
    pdf = view.page.pdf(print_background=True)
    assert pdf.startswith(b"%PDF-") and len(pdf) > 20_000
    view.page.emulate_media(media="print", color_scheme="no-preference")
    assert view.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
