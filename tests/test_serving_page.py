"""The server's page in a real browser, against the real application with an engine that plays from
a script: what a keyboard, a mouse and a screen reader can do, and what goes over the wire."""

import asyncio
import contextlib
import json
import re
import socket
import threading
import time

import pytest
import scripted
import uvicorn
from browsing import CONTRAST, WIDER, chromium
from scripted import CHAIN, RESPONSE, Script

from gtalign_jax.serving.api import ApiConfig
from gtalign_jax.serving.engine import Overloaded

QUESTION = "What sound does it make?"
STEERED = "It is 4."  # what the script answers after an edited matrix
PRICE = "#per_token-output"
ELEMENTS = "body, h1, h2, h3, h4, p, label, button, summary, th, td, td span, td b, li, abbr"
HOSTILE = '<img src=x onerror="alert(1)"><script>alert(2)</script>'

# From which price of output on the script's model answers directly. Both sides together gain 6 by
# asking and 4 by answering; asking takes 130 input tokens and 70 output tokens more, of which the
# user pays the first with 5 dollars a million at 400 points a dollar, the provider gains them at
# 100, and bears 1 and 6 dollars a million of its own.
EDGE = (2 - 1e-6 * (300 * 5 * 130 + 100 * (1 * 130 + 6 * 70))) / (300 * 70e-6)


def edge(words: str) -> float:
    """The price in what the strip says."""
    found = re.fullmatch(
        r"At \$0 the model asks back; from \$([\d.,]+) it answers directly\.", words
    )
    return float(found[1].replace(",", ""))


@contextlib.contextmanager
def served(app):
    """Runs an application on a free port of this machine -> its address."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


class Tab:
    """A page of the server's, and what it asked for."""

    def __init__(self, page, address: str):
        self.page, self.address = page, address
        self.sent: list[tuple[str, dict]] = []
        self.most = self.now = 0  # decisions on their way at once
        page.on("request", self._asked)
        page.on("requestfinished", self._over)
        page.on("requestfailed", self._over)

    def _asked(self, request):
        if request.method == "POST":
            body = json.loads(request.post_data)
            self.sent.append((request.url.removeprefix(self.address), body))
        self.now += request.url.endswith("/decide")
        self.most = max(self.most, self.now)

    def _over(self, request):
        self.now -= request.url.endswith("/decide")

    def bodies(self, path: str) -> list[dict]:
        return [body for url, body in self.sent if url == path]

    @property
    def asked(self) -> list[dict]:
        return self.bodies("v1/chat/completions")

    def see(self, selector: str, text: str, timeout: float = 60_000):
        """Waits until an element says this."""
        from playwright.sync_api import expect

        expect(self.page.locator(selector).first).to_contain_text(text, timeout=timeout)

    def ask(self, question: str = QUESTION):
        self.page.locator("#question").fill(question)
        self.page.keyboard.press("Enter")

    def until(self, true, seconds: float = 60):
        """Waits for something on this side of the wire; the page's events go on meanwhile."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end
            self.page.wait_for_timeout(20)


@pytest.fixture
def open_tab(browser):
    """open_tab(*scripts, width=, scheme=, refused=, config=, steered=, price=) -> (tab, engine).

    At the end no page asked for anything elsewhere, and none complained, but of what was refused.
    """
    complaints = []
    with contextlib.ExitStack() as stack:

        def start(*scripts, width=1280, scheme="light", refused="", config=None, **settings):
            app, engine = scripted.make(*scripts, config=config, **settings)
            address = stack.enter_context(served(app))
            context = stack.enter_context(browser.new_context(
                viewport={"width": width, "height": 900}, color_scheme=scheme,
                reduced_motion="reduce",
            ))

            def fetch(route):
                if route.request.url.startswith(address):
                    route.continue_()
                else:
                    complaints.append(f"asked for {route.request.url}")
                    route.abort()

            def console(message):
                if not (refused and re.search(refused, message.text)):
                    complaints.append(f"console: {message.text}")

            context.route("**/*", fetch)
            page = context.new_page()
            page.on("console", console)
            page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
            page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
            tab = Tab(page, address)
            page.goto(address)
            return tab, engine

        yield start
    assert complaints == []


def test_a_price_moved_by_keyboard_changes_the_choice_and_then_the_answer(open_tab):
    tab, _ = open_tab()
    tab.ask()
    tab.see("#before", RESPONSE)
    tab.see("#before", "It is vague.")
    tab.see("#move", "asks back")
    tab.see("#strip-words", "from")
    assert edge(tab.page.locator("#strip-words").inner_text()) == pytest.approx(EDGE, rel=0.07)
    assert tab.page.locator("#after").inner_text().startswith("With a price\n")
    assert len(tab.asked) == 1 and tab.asked[0]["pricing"] == {"policy": "none"}

    tab.page.locator(PRICE).focus()
    tab.page.keyboard.press("ArrowRight")
    tab.page.keyboard.press("End")
    tab.see("#move", "answers directly")
    tab.see("#after", STEERED)
    assert "Without a price it asks back." in tab.page.locator("#verdict").inner_text()
    after = tab.asked[1]
    assert after["pricing"]["output"] == 10_000 and after["mode"] == "action"
    assert after["messages"] == tab.asked[0]["messages"] and after["seed"] == tab.asked[0]["seed"]
    tab.see("#said", STEERED)  # what a screen reader hears

    tab.page.keyboard.press("Home")
    tab.see("#move", "asks back")
    tab.until(lambda: len(tab.asked) == 3)
    assert tab.asked[2]["pricing"]["output"] == 0
    tab.until(lambda: tab.page.locator("#answered li").count() == 3)
    tab.page.locator("#answered button").nth(1).click()
    tab.see("#before", STEERED)


@pytest.mark.parametrize("price, policy, shown", [
    ("per_token:output=100", "per_token", {"output": "100", "input": "5"}),
    ("free:ads=0.5,quota=0.25", "free", {"ads": "0.5", "quota": "0.25", "nuisance": "0.001"}),
    ("subscription", "subscription", {"cost_output": "6"}),
    ("none", "per_token", {"output": "30"}),
    ("subscription + per_request", "per_token", {"output": "30"}),
])  # fmt: skip
def test_the_controls_begin_with_the_servers_own_prices(open_tab, price, policy, shown):
    from playwright.sync_api import expect

    page = open_tab(steered=True, price=price)[0].page
    expect(page.locator("#policy")).to_have_value(policy)
    for key, value in shown.items():
        expect(page.locator(f"#{policy}-{key}-exact")).to_have_value(value)


def test_a_drag_sends_one_decision_at_a_time_and_one_question_when_it_rests(open_tab):
    tab, _ = open_tab()
    tab.ask()
    tab.see("#strip-words", "from")  # the survey is over
    before, page, slider = len(tab.bodies("v1/game/decide")), tab.page, tab.page.locator(PRICE)
    tab.until(lambda: tab.now == 0)
    tab.most = 0
    page.clock.install()
    page.clock.pause_at(page.evaluate("Date.now()") + 1000)  # a slow machine must not look at rest
    slider.scroll_into_view_if_needed()
    box, share = slider.bounding_box(), int(slider.input_value()) / 240
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 8 + share * (box["width"] - 16), y)
    page.mouse.down()
    values = set()
    for i in range(1, 41):
        page.mouse.move(box["x"] + box["width"] * (share + (0.98 - share) * i / 40), y)
        page.clock.run_for(20)
        values.add(slider.input_value())
    page.mouse.up()
    assert len(tab.asked) == 1 and len(values) > 20
    for _ in range(500):
        page.clock.run_for(50)
        if len(tab.asked) == 2:
            break
    tab.see("#after", STEERED)
    tab.see("#move", "answers directly")
    decisions = tab.bodies("v1/game/decide")[before:]
    assert 2 <= len(decisions) and tab.most == 1
    assert len(tab.asked) == 2  # all moves of the drag, and one question
    price = float(page.locator(f"{PRICE}-exact").input_value())
    assert tab.asked[1]["pricing"]["output"] == price > 1000


def test_sensitivity_use_rule_and_mode_count_too(open_tab):
    tab, _ = open_tab()
    page = tab.page
    tab.ask()
    tab.see("#move", "asks back")
    for summary in page.locator(".settings summary").all():
        summary.click()
    page.locator("#sensitivity-1").press("End")  # now 30 dollars a million are a great deal
    tab.see("#after", STEERED)
    tab.see("#after .price", "a dollar counts 100 to the model, 100,000 to you")
    assert tab.asked[-1]["sensitivity"] == [100, 100_000] and tab.asked[-1]["usage"] == {
        "input": [100, 230, 100], "output": [60, 130, 90], "requests": [1, 2, 1]}
    page.locator("#mode").select_option("matrix")
    tab.see("#answered", "The payoffs alone")
    assert tab.asked[-1]["mode"] == "matrix" and len(tab.asked) == 3
    for unit in ("read", "written"):
        page.get_by_label(f"Asks back: tokens {unit}").fill("1")
    tab.see("#move", "asks back")
    assert tab.bodies("v1/game/decide")[-1]["usage"]["output"] == [60, 1, 90]
    page.locator("#rule").select_option("stackelberg")
    tab.see("#answered", "The model leads")
    assert tab.asked[-1]["rule"] == "stackelberg"


def test_a_newer_price_takes_the_place_of_the_answer_under_way(open_tab):
    held = asyncio.Event()  # never set: this answer would not come
    tab, engine = open_tab(Script(), Script(held=held), Script())
    tab.ask()
    tab.see("#move", "asks back")
    tab.page.locator(PRICE).focus()
    tab.page.keyboard.press("End")
    tab.until(lambda: len(engine.tickets) == 2)
    tab.page.keyboard.press("Home")
    tab.until(lambda: len(engine.tickets) == 3 and engine.tickets[1].cancelled)
    tab.until(lambda: tab.page.locator("#answered li").count() == 2)
    assert tab.page.locator("#after").get_attribute("aria-busy") == "false"


def test_the_page_fits_and_can_be_read(open_tab, tmp_path):
    tab, _ = open_tab()
    page = tab.page
    tab.ask()
    tab.see("#move", "asks back")
    page.locator(PRICE).focus()
    page.keyboard.press("End")
    tab.see("#answered", STEERED)
    for summary in page.locator("details:not([open]) > summary").all():
        if summary.is_visible():
            summary.click()
    for width, scheme in [(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")]:
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        shot = tmp_path / f"{width}-{scheme}.png"
        page.screenshot(path=shot)
        assert shot.stat().st_size > 10_000
        assert page.evaluate("document.documentElement.scrollWidth") == width, page.evaluate(WIDER)
        assert page.evaluate(WIDER) == []
        for ratio, what in page.evaluate(CONTRAST, ELEMENTS):
            assert ratio >= 4.5, f"{width} {scheme}, {what}: {ratio:.2f}"
        cells = page.locator(".matrix td, .matrix th")
        assert cells.evaluate_all("all => all.filter(e => e.scrollWidth > e.clientWidth)") == []


def test_every_control_has_a_name_and_the_matrix_its_headers(open_tab):
    tab, _ = open_tab()
    tab.ask()
    tab.see("#move", "asks back")
    for policy in tab.page.locator("#policy option").all():
        tab.page.locator("#policy").select_option(policy.get_attribute("value"))
        tree = tab.page.context.new_cdp_session(tab.page).send("Accessibility.getFullAXTree")
        roles = {"button", "slider", "spinbutton", "textbox", "combobox", "DisclosureTriangle"}
        found = [node for node in tree["nodes"] if node.get("role", {}).get("value") in roles]
        assert len(found) >= 10
        assert [node for node in found if not node.get("name", {}).get("value", "").strip()] == []
    assert tab.page.locator("#edited caption").inner_text() == "At these prices"
    assert tab.page.locator("#edited th[scope=col]").count() == 4
    assert tab.page.locator("#edited tbody th[scope=row]").count() == 2
    chosen = tab.page.locator("#written td.chosen")
    assert chosen.inner_text().split() == "model 3.0 you 3.0 ✓ chosen ◆ Pareto".split()


def test_a_keyboard_alone_reaches_the_prices(open_tab):
    tab, _ = open_tab()
    page = tab.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.type(QUESTION)
    assert page.locator("#question").input_value() == QUESTION
    page.keyboard.press("Enter")
    tab.see("#move", "asks back")
    for _ in range(12):
        if page.evaluate("'#' + document.activeElement.id") == PRICE:
            break
        page.keyboard.press("Tab")
    page.keyboard.press("End")
    tab.see("#move", "answers directly")


def test_what_the_server_refuses_is_said_in_words(open_tab):
    busy = Script(refuse=Overloaded(7.2))
    config = ApiConfig(key="sesame")
    tab, _ = open_tab(busy, Script(), busy, Script(), refused="429|401|ERR_FAILED", config=config)
    tab.see("#ask-error", "The server asks for a key.")
    assert tab.page.locator("#key").is_visible()
    tab.page.locator("#key").fill("simsalabim")
    tab.ask()
    tab.see("#ask-error", "The server does not know this key.")
    tab.page.locator("#key").fill("sesame")
    tab.ask()
    tab.see("#ask-error", "The server is busy. Ask again in 8 seconds.")
    tab.ask()
    tab.see("#move", "asks back")
    assert not tab.page.locator("#ask-error").is_visible()
    tab.page.locator(PRICE).focus()
    tab.page.keyboard.press("End")
    tab.see("#answer-error", "The server is busy. Ask again in 8 seconds.")
    tab.page.locator("#again").click()
    tab.see("#after", STEERED)
    assert not tab.page.locator("#answer-error").is_visible()
    tab.page.context.route("**/v1/**", lambda route: route.abort())
    tab.page.locator(PRICE).press("Home")
    tab.see("#game-error", "The server cannot be reached.")
    assert tab.page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [
        0, 0, ""]


def test_a_refused_price_leaves_no_decision_of_an_older_one(open_tab):
    tab, _ = open_tab(refused="status of 4")
    tab.ask()
    tab.see("#strip-words", "from")
    tab.page.locator(f"{PRICE}-exact").fill("5000000")
    tab.see("#game-error", "per_token.output is 5000000; allowed are numbers from 0 to 1e+06")
    tab.see("#verdict-title", "No move at these prices")
    tab.page.wait_for_timeout(800)  # longer than a rest
    assert tab.page.locator("#game-error").is_visible()
    assert "No move" in tab.page.locator("#verdict").inner_text() and len(tab.asked) == 1
    tab.page.locator(f"{PRICE}-exact").fill("2500")
    tab.see("#move", "answers directly")
    assert not tab.page.locator("#game-error").is_visible()


def test_text_of_the_model_is_only_text_and_without_a_matrix_it_is_only_shown(open_tab):
    hostile = CHAIN.replace(RESPONSE, HOSTILE).replace("It is vague.", HOSTILE)
    tab, _ = open_tab(Script("Hello."), Script(hostile))
    assert not tab.page.locator("#before, #policy").first.is_visible()
    tab.ask()
    tab.see("#before", "Hello.")
    tab.see("#ask-error", "Prices cannot steer this answer: no <payoff> block.")
    assert not tab.page.locator("#policy").is_visible()
    tab.ask(HOSTILE)
    tab.see("#before .text", HOSTILE)
    tab.see("#before .chain", HOSTILE)
    tab.see("#move", "asks back")
    assert tab.page.locator("img").count() == 0 and tab.page.locator("script").count() == 1


def test_a_slider_and_its_number_say_the_same(open_tab):
    tab, _ = open_tab()
    wrong = tab.page.evaluate("""async () => {
      const { LAST, fromStep, toStep } = await import("/prices.js");
      const wrong = [];
      const scales = [{ least: 0.01, most: 10000 }, { least: 0.0001, most: 10, signed: true }];
      for (const scale of scales) {
        let last = -Infinity;
        for (let step = 0; step <= LAST; step += 1) {
          const value = fromStep(step, scale);
          if (toStep(value, scale) !== step || value <= last) wrong.push([step, value]);
          last = value;
        }
        if (fromStep(LAST, scale) !== scale.most) wrong.push("most");
        if (fromStep(0, scale) !== (scale.signed ? -scale.most : 0)) wrong.push("least");
      }
      return wrong;
    }""")
    assert wrong == []
    tab.ask()
    tab.see("#move", "asks back")
    tab.page.locator(f"{PRICE}-exact").fill("2500")
    tab.see("#move", "answers directly")
    assert tab.page.locator(PRICE).get_attribute("aria-valuetext") == "2,500 dollars"
    tab.page.locator(f"{PRICE}-exact").fill("")
    assert tab.page.locator(f"{PRICE}-exact").get_attribute("aria-invalid") == "true"
    tab.page.locator(PRICE).press("ArrowRight")
    assert tab.page.locator(f"{PRICE}-exact").get_attribute("aria-invalid") == "false"
