"""The search page in a real browser: Chromium, where it is installed with its driver."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.config import load_section
from runners.search.searcher import Searcher
from tests.checkpoints import configured, saved
from tests.commands import ROOT, run
from tests.datasets import smooth_picture

pytest.importorskip("fastapi")
webdriver = pytest.importorskip("selenium.webdriver")
import uvicorn  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from runners.search.service import ServeConfig, Service, create_app  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium or chromedriver is not installed"),
]
PICTURES = 12


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def address(pictures: Path, tiny_overrides: list[str]) -> Iterator[str]:
    """A running service; a text among its items looks like HTML."""
    saved(configured("DSPH", tiny_overrides), pictures / "best.pt")
    rows: list[dict[str, Any]] = [{"text": "<img src=x onerror=alert(1)>"}]
    for number in range(PICTURES):
        smooth_picture(number, 60, 40).save(pictures / f"{number}.png")
        rows.append({"image": f"{number}.png", "text": f"picture number {number}"})
    (pictures / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = pictures / "index"
    command = ("--index", pictures / "best.pt", "--input", pictures / "rows.jsonl", "--save-dir", index)
    assert run(*command, "--device", "cpu", "search.k=8")[0] == 0
    config = load_section(ROOT / "configs/serve.yaml", "serve", ServeConfig, ["serve.upload_bytes=100000"])
    service = Service(Searcher.open(index, device="cpu"), config)
    server = uvicorn.Server(uvicorn.Config(create_app(service), port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()
    service.close()


class Browser:
    """Chromium without a window; waits for what a page shows."""

    def __init__(self, address: str) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self.address = address

    def open(self, behind: str = "") -> None:
        self.driver.get("about:blank")
        self.driver.get(self.address + behind)
        self.until(lambda: "picture" in self.text("#about"))

    def until(self, condition: Any) -> Any:
        return WebDriverWait(self.driver, 20).until(lambda _: condition())

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return str(self.driver.execute_script("return document.querySelector(arguments[0]).textContent", selector))

    def shows(self, title: str) -> list[str]:
        """Waits for the answer under a title: what screen readers say of its hits."""
        self.until(lambda: title in self.text("#status") and not self.all("body.busy"))
        return [card.get_attribute("aria-label") for card in self.all(".card")]

    def size(self, width: int, height: int, theme: str) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        feature = {"name": "prefers-color-scheme", "value": theme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


@pytest.fixture(scope="module")
def started(address: str) -> Iterator[Browser]:
    browser = Browser(address)
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(started: Browser) -> Iterator[Browser]:
    """The browser at the page; whatever it complains about fails the test."""
    started.size(1280, 800, "light")
    started.open()
    started.driver.get_log("browser")
    yield started
    assert started.driver.get_log("browser") == []


def test_text_then_more_like_a_hit_then_back(browser: Browser) -> None:
    field = browser.driver.switch_to.active_element
    assert field.get_attribute("id") == "text"
    field.send_keys("picture number 3", Keys.ENTER)
    hits = browser.shows("“picture number 3”")
    assert len(hits) == 8 and all(hit.startswith("picture picture number") for hit in hits)
    loaded = "return [...document.querySelectorAll('.card img')].filter(i => i.naturalWidth).length"
    browser.until(lambda: browser.driver.execute_script(loaded) == 8)
    browser.all(".card")[2].click()
    like = browser.shows("More like “picture number")
    assert len(like) == 8 and hits[2] not in like
    browser.driver.back()
    assert browser.shows("“picture number 3”") == hits
    browser.driver.refresh()
    assert browser.shows("“picture number 3”") == hits


def test_a_picture_chosen_dropped_and_pasted(browser: Browser, pictures: Path) -> None:
    browser.driver.find_element(By.ID, "file").send_keys(str(pictures / "5.png"))
    hits = browser.shows("Like 5.png")
    assert any("picture number 5, 0 of 16 bits" in hit for hit in hits)
    assert any(hit.startswith("text ") for hit in hits) or len(hits) == 8
    assert browser.all("#asked")[0].get_property("naturalWidth") == 60
    for event, place in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        browser.open()
        browser.driver.execute_async_script(
            """const [event, place, name, done] = arguments;
            fetch("/api/items/13/thumbnail").then(answer => answer.blob()).then(blob => {
              const data = new DataTransfer();
              data.items.add(new File([blob], name, {type: "image/jpeg"}));
              const made = event === "drop" ? new DragEvent(event, {[place]: data, bubbles: true, cancelable: true})
                : new ClipboardEvent(event, {[place]: data, bubbles: true});
              document.body.dispatchEvent(made);
              done();
            })""",
            *(event, place, f"{event}.jpg"),
        )
        assert len(browser.shows(f"Like {event}.jpg")) == 8


def test_texts_are_shown_as_they_are(browser: Browser) -> None:
    """An item that looks like HTML is text: nothing of it runs."""
    browser.open("#text=anything&find=text")
    assert all(hit.startswith("text ") for hit in browser.shows("“anything”"))
    assert browser.driver.find_element(By.ID, "find").get_property("value") == "text"
    browser.open("#item=12&find=both")  # pictures come first, then the text alone
    browser.shows("More like item 12")
    browser.open("#text=<img src=x onerror=alert(1)>&find=text")
    browser.shows("“<img src=x onerror=alert(1)>”")
    assert not browser.all("main img[src='x'], h1 img")


def test_the_keyboard_is_enough(browser: Browser) -> None:
    press = browser.driver.switch_to.active_element.send_keys
    press("number", Keys.ENTER)
    hits = browser.shows("“number”")

    def focused() -> str:
        return str(browser.driver.switch_to.active_element.get_attribute("aria-label"))

    press(Keys.ARROW_DOWN)
    assert focused() == hits[0]
    browser.driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert focused() == hits[1]
    browser.driver.switch_to.active_element.send_keys(Keys.TAB)
    assert focused() == hits[2]
    browser.driver.switch_to.active_element.send_keys(Keys.ENTER)
    browser.shows("More like")
    browser.driver.find_element(By.TAG_NAME, "body").send_keys("/")
    assert browser.driver.switch_to.active_element.get_attribute("id") == "text"


def test_errors_are_shown(started: Browser, pictures: Path) -> None:
    """The browser's log names the failed requests, so it is not looked at here."""
    started.open()
    (pictures / "broken.png").write_bytes(b"no picture")
    (pictures / "large.png").write_bytes(b"x" * 100_001)
    for name, message in (("broken.png", "is not a picture"), ("large.png", "a request may have 100,000 bytes")):
        started.driver.find_element(By.ID, "file").send_keys(str(pictures / name))
        started.until(lambda: message in started.text("#error"))  # noqa: B023 - used at once
        assert started.all("#error")[0].is_displayed() and not started.all(".card")
    started.open("#item=999")
    started.until(lambda: "there is no item 999" in started.text("#error"))


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_it_fits_every_screen(browser: Browser, width: int, theme: str) -> None:
    """Nothing reaches over the edge, targets are large enough for a finger, and text stands out from its ground."""
    browser.size(width, 800, theme)
    browser.open("#text=number&find=both")
    assert len(browser.shows("“number”")) == 8
    assert browser.driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    columns = browser.driver.execute_script(
        "return getComputedStyle(document.getElementById('hits')).gridTemplateColumns.split(' ').length"
    )
    assert columns == (2 if width < 600 else 6)
    for control in browser.all("form > button, form > select, form > input[type=search]"):
        assert control.size["height"] >= 44
    for selector, least in (("h1", 7), (".caption", 4.5), (".bits", 4.5), ("footer", 4.5), ("form > button", 4.5)):
        assert browser.driver.execute_script(CONTRAST, selector) >= least, selector
    ground = browser.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground.removeprefix("rgb(").rstrip(")").split(","))) < 200) == (theme == "dark")


CONTRAST = """
const light = (colour) => {
  const linear = (value) => value <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4;
  const [red, green, blue] = colour.match(/[\\d.]+/g).slice(0, 3).map(value => linear(value / 255));
  return .2126 * red + .7152 * green + .0722 * blue;
};
const element = document.querySelector(arguments[0]);
let ground = element;
while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
const [a, b] = [light(getComputedStyle(element).color), light(getComputedStyle(ground).backgroundColor)];
return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
"""  # of WCAG 2
