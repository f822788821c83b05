"""The page of a bundle in a real headless Chromium, driven over a pipe: it loads, shows, fits a phone and prints."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_build import Shared
from test_page import HOSTILE, hostile_page

from edgeprune.page import page_of_bundle

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
    pytest.mark.timeout(300),
]
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
)
WIDE, PHONE = 1280, 390
ERRORS = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Network.loadingFailed")


class Browser:
    """One Chromium with one page; commands go down a pipe and events are kept."""

    def __init__(self, profile: Path) -> None:
        (read, self._commands), (self._answers, write) = os.pipe(), os.pipe()
        argv = ["bash", "-c", f'exec "$0" "$@" 3<&{read} 4>&{write}', CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(argv, pass_fds=(read, write), stderr=subprocess.DEVNULL)
        os.close(read)
        os.close(write)
        self._number, self._session, self._unread = 0, "", b""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, (method, answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            piece = os.read(self._answers, 1 << 20)
            assert piece, "chromium has ended"
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def show(self, path: Path, width: int, scheme: str = "light") -> None:
        """Load a file in a window of this width; events begin anew."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == PHONE}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._read())

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def picture(self) -> np.ndarray:
        """The whole page, (H, W, 3) bytes."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(shot))).convert("RGB"))

    def close(self) -> None:
        """End it."""
        os.close(self._commands)
        os.close(self._answers)
        self._process.terminate()
        self._process.wait(30)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests of this file."""
    found = Browser(tmp_path_factory.mktemp("chromium"))
    yield found
    found.close()


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


def asked_for(browser: Browser) -> set[str]:
    """Addresses that the page asked for, other than those it holds itself."""
    requests = (e["params"]["request"] for e in browser.events if e.get("method") == "Network.requestWillBeSent")
    return {request["url"] for request in requests if not request["url"].startswith("data:")}


@pytest.mark.parametrize("kind", ["built", "hostile"])
@pytest.mark.parametrize(("width", "scheme"), [(WIDE, "light"), (WIDE, "dark"), (PHONE, "light"), (PHONE, "dark")])
def test_loads_and_shows(browser: Browser, page: Callable[[str], Path], kind: str, width: int, scheme: str) -> None:
    browser.show(page(kind), width, scheme)
    assert not [e for e in browser.events if e.get("method") in ERRORS]
    assert asked_for(browser) == {page(kind).as_uri()}
    assert browser.value("document.title") != "broken"

    boxes = """[...document.querySelectorAll('svg.chart')].map(svg => {
        const box = svg.getBoundingClientRect();
        return [svg.ariaLabel, box.left, box.top, box.width, box.height].map(v => v.toFixed ? Math.round(v) : v);
    })"""
    charts = browser.value(boxes)
    assert [name.partition(":")[0] for name, *_ in charts] == [
        "Staircase",
        "Tokens that each block hands on",
        "Pareto front",
        "Predicted against measured latency",
    ]
    text = browser.value(
        "Math.min(...[...document.querySelectorAll('text')].map(t => t.getBoundingClientRect().height))"
    )
    assert text >= 9  # px, on a phone too
    pictures = browser.value("[...document.querySelectorAll('svg.picture')].map(s => s.clientWidth)")
    assert len(pictures) >= 4 and min(pictures) > 90
    assert browser.value("document.documentElement.scrollWidth") <= width

    shot = browser.picture()
    assert shot.shape[1] == width and len(shot) > 1200
    paper = shot[0, 0].mean()
    assert paper > 240 if scheme == "light" else paper < 40
    for _, left, top, wide, high in charts:
        assert 350 <= wide <= 560
        assert colours(shot[top : top + high, left : left + wide]) > 20
    end = browser.value("document.querySelector('footer').offsetTop")
    for band in np.array_split(shot[: int(end)], 12):  # something is drawn all the way down
        assert colours(band) > 20


def colours(shot: np.ndarray) -> int:
    """How many a picture has: 1 where it is blank."""
    return len(np.unique(shot[::2] @ np.array([1 << 16, 1 << 8, 1])))


def test_what_a_page_does_wrong_is_seen(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<script>console.error(1); nothing()</script><img src='missing.png' width=2000>")
    browser.show(page, PHONE)
    seen = {event["method"] for event in browser.events}
    assert {*ERRORS} <= seen
    assert len(asked_for(browser)) == 2
    assert browser.value("document.documentElement.scrollWidth") > PHONE
    assert colours(browser.picture()[300:600]) < 20


def test_texts_of_a_chart_stay_inside_it(browser: Browser, page: Callable[[str], Path]) -> None:
    inside = """[...document.querySelectorAll('svg.chart')].flatMap(svg => {
        const box = svg.getBoundingClientRect();
        return [...svg.querySelectorAll('text, circle, rect')].filter(part => {
            const b = part.getBoundingClientRect();
            const across = b.left < box.left - 1 || b.right > box.right + 1;
            return across || b.top < box.top - 1 || b.bottom > box.bottom + 1;
        }).map(part => part.outerHTML);
    })"""
    for kind in ("built", "hostile"):
        for width in (WIDE, PHONE):
            browser.show(page(kind), width)
            assert browser.value(inside) == []


def test_hostile_names_are_shown_as_text(browser: Browser, page: Callable[[str], Path]) -> None:
    browser.show(page("hostile"), WIDE)
    assert HOSTILE in browser.value("document.body.innerText")
    assert browser.value("document.querySelectorAll('script, iframe, [onerror], [onload]').length") == 0


def test_prints(browser: Browser, page: Callable[[str], Path]) -> None:
    browser.show(page("built"), WIDE, "dark")
    pdf = base64.b64decode(browser.call("Page.printToPDF", printBackground=True)["data"])
    assert pdf.startswith(b"%PDF-") and len(pdf) > 20_000
    browser.call("Emulation.setEmulatedMedia", media="print", features=[])
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    browser.call("Emulation.setEmulatedMedia", media="", features=[])
