"""The report in a real browser: its scripts draw what they should, obey mouse and keyboard, and ask for nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ens.pareto.archive import open_archive, read_archive, record_tuned
from ens.pareto.baseline import Baseline
from ens.pareto.report import write_front
from ens.pareto.selection import Front, select_front
from ens.space import Choice, Measurement, SearchSpace, Slot, format_genotype

CHOICES = (Choice("restormer", 2, teacher=True), Choice("vssd", 1), Choice("conv", 1))
SLOTS = ("encoder_level1", "encoder_level2", "latent", "decoder_level2", "decoder_level1", "refinement")
SPACE = SearchSpace("browser", tuple(Slot(name, CHOICES) for name in SLOTS))
KEYS = {"Tab": 9, "Enter": 13, "End": 35, "Home": 36, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")]


class Browser:
    """Headless Chromium on one page, driven through its debugging pipe (DevTools protocol, messages end in zero)."""

    def __init__(self, page: Path) -> None:
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec chromium "$@" 3<&{commands} 4>&{answers}', "bash", "--headless=new", "--no-sandbox",
             "--disable-gpu", "--no-first-run", "--disable-background-networking", "--remote-debugging-pipe",
             "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={page.parent / 'profile'}", "about:blank"],
            pass_fds=(commands, answers), stderr=subprocess.DEVNULL)
        for end in (commands, answers):
            os.close(end)
        self._unread, self._count = b"", 0
        self._session: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        target = next(one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page")
        session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        self._url = page.as_uri()
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.load()

    def load(self) -> None:
        """The page as it is at first, whatever was done to it before."""
        self.events.clear()
        self.call("Page.navigate", url=self._url)
        while not self.saw("Page.loadEventFired"):
            self.events.append(self._read())

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            received = os.read(self._answers, 1 << 16)
            assert received, "the browser has ended"
            self._unread += received
        message, self._unread = self._unread.split(b"\0", 1)
        return json.loads(message)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        command = {"id": self._count, "method": method, "params": parameters, **self._session}
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while (message := self._read()).get("id") != self._count:
            self.events.append(message)
        assert "result" in message, message
        return message["result"]

    def saw(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event["method"] == method]

    def ask(self, expression: str) -> Any:
        """Value of a JavaScript expression on the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> str:
        """Press a key; returns what has the focus then: its id, or its element's name."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key],
                      **(text if kind == "keyDown" else {}))
        return self.ask("document.activeElement.id || document.activeElement.tagName")

    def select(self, name: str, value: str) -> None:
        """Choose an option of a list."""
        self.ask(f"(list => {{ list.value = '{value}'; list.dispatchEvent(new Event('change')); }})"
                 f"(document.getElementById('{name}'))")

    @property
    def chosen(self) -> str:
        return self.ask("document.getElementById('chosen').textContent")

    def show(self, *, width: int, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        # Observers of sizes are called before the next frame is painted, which takes a while on a busy machine.
        self.ask("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def close(self) -> None:
        self.call("Browser.close")
        self._process.wait(timeout=60)
        for end in (self._commands, self._answers):
            os.close(end)


@pytest.fixture
def opened(page: tuple[Front, Browser]) -> tuple[Front, Browser]:
    """A front whose knee is fine-tuned, and its page in a browser, as it is when it is opened."""
    page[1].load()
    return page


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Front, Browser]]:
    rng = np.random.default_rng(0)
    genotypes = sorted({(0,) * len(SLOTS), *(SPACE.sample(rng) for _ in range(30))})
    measured = [Measurement(item, {"psnr_drop_db": 0.1 * sum(item), "macs": 2e9 / (1 + sum(map(bool, item))),
                                   "params": 1e6 - sum(item)}, (30.0 - 0.1 * sum(item),)) for item in genotypes]
    folder, names = tmp_path_factory.mktemp("browser"), ("psnr_drop_db", "macs")
    with open_archive(folder / "archive.db", space=SPACE, objectives=names, baseline=Baseline(
            (30.0,), (20.0,), {"macs": 2e9}), manifest={"study": "In a browser"}) as archive:
        for item in measured:
            archive.record(item)
    front = select_front(measured, names, baseline=archive.baseline)
    record_tuned(folder / "archive.db", front.members[front.knee].genotype, recipe="abc", psnr_db=[29.9], report={})
    archive = read_archive(folder / "archive.db")
    front = select_front(archive.measurements(), names, baseline=archive.baseline)
    write_front(folder, front=front, archive=archive, crops={})
    browser = Browser(folder / "report.html")
    yield front, browser
    browser.close()


def genotype(front: Front, index: int) -> str:
    return format_genotype(front.members[index].genotype)


def test_no_script_fails_and_the_page_asks_for_nothing(opened: tuple[Front, Browser]) -> None:
    _, browser = opened
    assert not browser.saw("Runtime.exceptionThrown") and not browser.saw("Log.entryAdded")
    asked = [sent["request"]["url"] for sent in browser.saw("Network.requestWillBeSent")]
    assert len(asked) == 1 or all(url.startswith("data:") for url in asked[1:]), asked


def test_the_scripts_draw_every_measurement_the_teacher_the_input_and_the_slot_map(
        opened: tuple[Front, Browser]) -> None:
    front, browser = opened
    assert browser.chosen == genotype(front, front.knee)
    count = {name: browser.ask(f"document.querySelectorAll('#front .{name}').length")
             for name in ("point", "knee", "teacher", "tuned", "measured")}
    assert count == {"point": len(front.members), "knee": 1, "teacher": 1, "tuned": 1,
                     "measured": count["measured"]}
    beyond = browser.ask("document.getElementById('beyond').textContent")
    assert count["point"] + count["measured"] + int((beyond or "0").split()[0]) == len(front.measured)
    texts = browser.ask("[...document.querySelectorAll('#front .mark')].map(one => one.textContent)")
    assert sorted(texts) == ["knee", "teacher", "↑ degraded input, 10.00 dB"], "marked though it is far off"
    assert browser.ask("document.querySelectorAll('#shape rect').length") == len(SLOTS)
    cells = "[...document.querySelectorAll('#map td.cell')].filter(cell => cell.style.background).length"
    assert browser.ask(cells) == len(front.members) * len(SLOTS)
    assert browser.ask("document.querySelectorAll('#map tr.chosen').length") == 1
    values = browser.ask("document.getElementById('values').innerText")
    assert "before fine-tuning" in values and "29.90" in values.partition("Fine-tuned")[2]


def test_the_keyboard_reaches_the_chart_and_the_rows_and_chooses(opened: tuple[Front, Browser]) -> None:
    front, browser = opened
    browser.ask("document.activeElement.blur()")
    walk = [browser.press("Tab") for _ in range(6)]
    assert walk == ["axes", "range", "front", "SUMMARY", "copy", "TR"], "one stop each; rows are one stop too"
    by_cost = sorted(range(len(front.members)), key=lambda index: front.members[index].values["macs"])
    browser.ask("document.getElementById('front').focus()")
    for key, index in (("Home", by_cost[0]), ("ArrowRight", by_cost[1]), ("ArrowUp", by_cost[0]), ("End", by_cost[-1])):
        assert browser.press(key) == "front" and browser.chosen == genotype(front, index), key
    assert browser.ask("document.querySelectorAll('#front [aria-selected=true]').length") == 1
    while browser.press("Tab") != "TR":
        pass
    assert browser.press("Home") == "TR" and browser.chosen == genotype(front, 0)
    assert browser.press("ArrowDown") == "TR" and browser.chosen == genotype(front, 1)
    browser.ask(f"choose(view.members[{front.knee}])")
    assert browser.press("Enter") == "TR" and browser.chosen == genotype(front, 1)
    assert browser.ask("document.activeElement.className") == "chosen"


def test_a_click_chooses_and_the_button_copies_the_command_that_exports(opened: tuple[Front, Browser]) -> None:
    front, browser = opened
    browser.ask("document.getElementById('front').scrollIntoView({block: 'center'})")
    place = browser.ask("(box => [box.x + box.width / 2, box.y + box.height / 2])"
                        "(document.querySelector('#front .point .member').getBoundingClientRect())")
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)
    assert browser.chosen == genotype(front, 0)
    browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    browser.ask("document.getElementById('copy').click()")
    copied = browser.ask("navigator.clipboard.readText()")
    assert copied == f"{browser.ask('state.command')} --pick {genotype(front, 0)}" and copied.startswith("ens export /")


def test_other_axes_show_their_own_front_and_a_range_shows_everything(opened: tuple[Front, Browser]) -> None:
    front, browser = opened
    other = select_front(front.measured, ("macs", "params"), baseline=front.baseline)
    browser.select("axes", "2")
    assert browser.ask("document.querySelectorAll('#map tbody tr').length") == len(other.members)
    assert browser.chosen == genotype(other, other.knee)
    browser.select("axes", "0")
    browser.select("range", "all")
    assert browser.ask("document.querySelectorAll('#front .point, #front .measured').length") == len(front.measured)
    assert browser.ask("document.querySelectorAll('#front line.input').length") == 1


@pytest.mark.parametrize("width", [390, 1280, 1920])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_fits_every_width_and_text_stands_out_in_light_and_dark(width: int, dark: bool,
                                                                         opened: tuple[Front, Browser]) -> None:
    _, browser = opened
    browser.show(width=width, dark=dark)
    assert browser.ask("document.documentElement.scrollWidth <= innerWidth")
    assert browser.ask("document.getElementById('front').viewBox.baseVal.width - "
                       "document.getElementById('front').clientWidth") == 0, "drawn anew for this width"
    style = "getComputedStyle(document.querySelector('section .note'))"
    text, card = (browser.ask(f"{style}.color"), browser.ask("getComputedStyle(document.querySelector('section')"
                                                             ").backgroundColor"))
    assert contrast(text, card) >= 4.5 and (luminance(card) < 0.1) == dark


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours `rgb(r, g, b)` (WCAG 2)."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    channels = np.array(colour.removeprefix("rgb(").rstrip(")").split(","), float) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])
