"""A report in a real browser without a network: phone and desk, light and dark."""

import re
from pathlib import Path

import pytest
from browsing import CONTRAST, WIDER, chromium
from report_directories import HOSTILE, finished_run

from gtalign_jax import report

ELEMENTS = "body, h1, h2, h3, p, dt, dd, td, th, a, summary, li, figcaption, .below, .verdict"


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("browser") / "run"
    after_0 = {"completion": HOSTILE, "question": HOSTILE + "w" * 300, "judge_reply": HOSTILE}
    return report.write(finished_run(directory, after_0=after_0))


@pytest.fixture
def opened(browser, path):
    """opened(width, scheme) -> page; at the end nothing was fetched and nothing complained."""
    contexts, complaints = [], []

    def fetched(route):
        if route.request.url.startswith("file://"):
            route.continue_()
        else:
            complaints.append(f"asked for {route.request.url}")
            route.abort()

    def open_page(width: int, scheme: str):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce",
        )
        contexts.append(context)
        context.set_offline(True)
        context.route("**/*", fetched)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def color(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)[:3]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_and_can_be_read(opened, tmp_path, width, scheme):
    page = opened(width, scheme)
    page.screenshot(path=tmp_path / f"{width}-{scheme}.png")
    root = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert root[0] <= root[1] == width, page.evaluate(WIDER)
    assert page.evaluate(WIDER) == []
    boxes = page.evaluate("""() => [...document.querySelectorAll("svg")].map(e => {
        const box = e.getBoundingClientRect(); return [box.width, box.height]; })""")
    assert len(boxes) >= 10 and all(w > 100 and h > 50 for w, h in boxes), boxes
    for ratio, what in page.evaluate(CONTRAST, ELEMENTS):
        assert ratio >= 4.5, f"{what}: {ratio:.2f}"
    assert (tmp_path / f"{width}-{scheme}.png").stat().st_size > 10_000


def test_dark_is_dark_and_the_figures_follow(opened):
    found = {}
    for scheme in ("light", "dark"):
        page = opened(1280, scheme)
        found[scheme] = page.evaluate("""() => [
            getComputedStyle(document.body).backgroundColor,
            getComputedStyle(document.querySelector("figure svg text")).fill]""")
    (light_paper, light_ink), (dark_paper, dark_ink) = found["light"], found["dark"]
    assert sum(color(light_paper)) > 700 > 120 > sum(color(dark_paper))
    assert sum(color(light_ink)) < 350 < 450 < sum(color(dark_ink))


def test_a_keyboard_opens_what_folds_and_scrolls_wide_tables(opened):
    page = opened(390, "light")
    summary = page.locator("#setup summary").last
    summary.focus()
    code = page.locator("#setup pre").last
    assert not code.is_visible()
    page.keyboard.press("Enter")
    assert code.is_visible() and "cobb_douglas" in code.inner_text()
    box = page.locator("#measures .scroll").first
    box.focus()
    assert box.evaluate("e => e === document.activeElement && e.scrollWidth > e.clientWidth")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.activeElement.scrollLeft > 0", timeout=5000)
    page.keyboard.press("Home")
    page.evaluate("document.activeElement.blur()")
    page.goto(page.url)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"


def test_a_hostile_completion_is_only_text(opened):
    page = opened(1280, "light")
    assert page.evaluate("document.querySelectorAll('script, img, b[onclick]').length") == 0
    assert "onerror=alert(1)" in page.locator("#examples").inner_text()


def test_on_paper_everything_is_unfolded_and_light(opened):
    page = opened(1280, "dark")
    page.emulate_media(media="print")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(color(paper)) > 700
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert page.locator("#setup pre").last.bounding_box()["height"] > 200
