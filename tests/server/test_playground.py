"""The page at `/`, in a real Chromium."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from moa_ray.server import ServerSettings
from tests.commands import ROOT
from tests.conftest import until
from tests.server.local import Served, serving

FILES = ROOT / "moa_ray" / "server" / "playground"
PARTS = ["index.html", "style.css", "app.js", "run.js", "stream.js"]
LIMIT = 300_000


def test_the_page_and_its_files_are_small_and_name_nothing_elsewhere() -> None:
    with serving(2) as served:
        answers = [httpx2.get(f"{served.url}/")] + [httpx2.get(f"{served.url}/playground/{n}") for n in PARTS[1:]]
        for name in ("index.html", "__init__.py", "../app.py"):
            assert httpx2.get(f"{served.url}/playground/{name}").status_code == 404
    assert {answer.status_code for answer in answers} == {200}
    assert sum(len(answer.content) for answer in answers) < LIMIT
    assert all("default-src 'none'" in answer.headers["content-security-policy"] for answer in answers)
    links = {link for answer in answers for link in re.findall(r"https?://[^\s\"']+", answer.text)}
    assert links <= {"http://www.w3.org/2000/svg"}


def test_every_file_of_the_page_is_in_the_wheel() -> None:
    assert sorted(path.name for path in FILES.iterdir() if path.suffix in (".html", ".css", ".js")) == sorted(PARTS)


# ---------------------------------------------------------------- in the browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium here; `make setup` installs it where it may")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    """Opens a server's page; what goes wrong in it is an error of the test."""
    wrong: list[str] = []
    pages: list[Any] = []

    def opened(served: Served, **options: Any) -> Any:
        page = browser.new_page(**options)
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        pages.append(page)
        page.goto(f"{served.url}/")
        wait_for(page, "document.querySelector('#graph').options.length > 0")
        return page

    yield opened
    for page in pages:
        page.close()
    assert wrong == []


def wait_for(page: Any, condition: str) -> None:
    """Until a JavaScript expression holds; Playwright's own way would have the page evaluate text, which it may not."""

    def holds() -> bool:
        page.wait_for_timeout(20)
        return bool(page.evaluate(condition))

    until(holds, within_s=60)


def ask(page: Any, question: str = "Why is the sky blue?") -> None:
    page.fill("#question", question)
    page.click("#go")


def test_a_question_lights_up_the_graph_streams_every_agent_and_ends_with_the_account(open_page: Any) -> None:
    with serving(3, 2, itl_s=0.03, reply_tokens=40, price={"prompt": 0, "completion": 100}) as served:
        page = open_page(served)
        ask(page)
        page.wait_for_selector(".call.running")
        wait_for(page, "document.querySelectorAll('.pane').length === 5")
        wait_for(page, "document.querySelector('.totals')?.textContent.includes('written')")
        assert page.locator(".totals").inner_text().endswith("240 written, $0.024000")
        assert page.locator(".call.finished").count() == 6
        assert page.locator(".dag line").count() == 3 * 2 + 2
        assert "39 40" in page.locator(".answer").inner_text()
        assert "39 40" in page.locator(".pane").first.inner_text()
        assert page.locator(".gantt div").count() == 6
        assert page.locator("#past li").count() == 1


def test_two_graphs_are_compared_side_by_side(open_page: Any) -> None:
    with serving(2) as served:
        page = open_page(served)
        page.select_option("#beside", "panel")
        ask(page)
        wait_for(page, "[...document.querySelectorAll('.totals')].filter(t => t.textContent).length === 2")
        first, second = (page.locator(".run").nth(n).bounding_box() for n in range(2))
        assert first["y"] == second["y"] and first["x"] + first["width"] <= second["x"]


def test_stop_stops_the_run_and_escape_does_too(open_page: Any) -> None:
    with serving(2, itl_s=0.05, reply_tokens=5000) as served:
        page = open_page(served)
        for by_key in (False, True):
            ask(page)
            page.wait_for_selector(".call.running")
            if by_key:
                page.keyboard.press("Escape")
            else:
                page.click("#stop")
            wait_for(page, "document.querySelector('.note')?.textContent.includes('stopped')")
            served.until_idle()


def test_what_a_model_says_is_never_markup(open_page: Any) -> None:
    attack = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    with serving(1, reply=attack) as served:
        page = open_page(served)
        page.on("dialog", lambda dialog: pytest.fail(dialog.message))
        ask(page, attack)
        wait_for(page, "document.querySelector('.totals')?.textContent.includes('written')")
        assert page.locator(".answer").inner_text() == attack
        assert page.locator("#runs img, #runs script, #past img").count() == 0


def test_thumbs_are_shown_where_feedback_is_kept_and_kept(open_page: Any, tmp_path: Path) -> None:
    with serving(2, settings=ServerSettings(feedback=tmp_path / "said.jsonl")) as served:
        page = open_page(served)
        ask(page)
        page.click(".thumbs button[value=up]")
        wait_for(page, "document.querySelector('.thumbs [role=status]')?.textContent === 'Thank you.'")
    assert '"rewards": {"a1": 1.0' in (tmp_path / "said.jsonl").read_text()


def test_everything_can_be_reached_by_keyboard_and_has_a_name(open_page: Any) -> None:
    with serving(2) as served:
        page = open_page(served)
        page.focus("#question")
        page.keyboard.type("why?")
        page.keyboard.press("Control+Enter")
        wait_for(page, "document.querySelector('.totals')?.textContent.includes('written')")
        nameless = page.evaluate(
            "[...document.querySelectorAll('button, select, input, textarea')].filter(e => e.offsetParent "
            "&& !(e.labels?.length || e.textContent.trim() || e.ariaLabel)).map(e => e.outerHTML)"
        )
        assert nameless == []
        assert page.locator("[aria-live=polite] .answer").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground_and_a_phone_shows_it_without_scrolling_sideways(
    open_page: Any, scheme: str
) -> None:
    with serving(3, 3, reply_tokens=40) as served:
        page = open_page(served, viewport={"width": 360, "height": 740}, color_scheme=scheme)
        ask(page)
        wait_for(page, "document.querySelector('.totals')?.textContent.includes('written')")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        poor = page.evaluate(CONTRAST)
        assert poor == []


CONTRAST = """() => {
  const rgb = (c) => { const d = document.createElement('canvas').getContext('2d');
    d.fillStyle = c; d.fillRect(0,0,1,1); return [...d.getImageData(0,0,1,1).data]; };
  const light = (c) => c.slice(0, 3).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, n) => sum + v * [.2126, .7152, .0722][n], 0);
  const ground = (e) => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c[3] > 250) return c; } return [255, 255, 255, 255]; };
  return [...document.querySelectorAll('body *')].filter(e => e.offsetParent && !e.disabled && [...e.childNodes].some(
    n => n.nodeType === 3 && n.textContent.trim())).map(e => {
      const [a, b] = [light(rgb(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
      return [e.className || e.tagName, e.textContent.slice(0, 20), (a + .05) / (b + .05)]; }).filter(r => r[2] < 4.5);
}"""


def test_it_is_ready_within_a_second_and_twenty_fast_agents_stay_smooth(open_page: Any) -> None:
    with serving(20, itl_s=0.005, reply_tokens=400) as served:
        page = open_page(served)
        ready = page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
        print(f"ready after {ready:.0f} ms")
        page.evaluate(
            "window.frames_ = []; let last = performance.now();"
            "(function f(t) { frames_.push(t - last); last = t; requestAnimationFrame(f) })(last)"
        )
        ask(page)
        wait_for(page, "document.querySelector('.totals')?.textContent.includes('written')")
        gaps = sorted(page.evaluate("frames_"))
        median, p95 = gaps[len(gaps) // 2], gaps[len(gaps) * 95 // 100]
        print(f"frames: median {median:.0f} ms, p95 {p95:.0f} ms, worst {gaps[-1]:.0f} ms")
        assert page.locator(".pane").count() == 20
