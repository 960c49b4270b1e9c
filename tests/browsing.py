"""Chromium for tests of pages: how it is found and opened, and what it can say of a page."""

import contextlib
import os
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# WCAG's contrast of each chosen element's text with what lies behind it: the lowest ones.
CONTRAST = """selector => {
  const channels = text => (text.match(/[\\d.]+/g) || []).map(Number).map(
    (c, i) => text.startsWith("color(srgb ") && i < 3 ? 255 * c : c
  );
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255).map(
    c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4
  ).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const color = channels(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] > 0) return color;
    }
    throw new Error("nothing behind " + element.tagName);
  };
  const found = [];
  for (const element of document.querySelectorAll(selector)) {
    if (!element.textContent.trim() || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const [a, b] = [channels(style.color), behind(element)].map(light);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    found.push([ratio, element.tagName + ": " + element.textContent.trim().slice(0, 40)]);
  }
  return found.sort((x, y) => x[0] - y[0]).slice(0, 5);
}"""

# What reaches beyond the right edge, but for what scrolls by itself or is for screen readers.
WIDER = """() => [...document.querySelectorAll("body *")].filter(
  e => !e.closest(".scroll, pre, svg") && !e.matches(".sr, .skip")
    && e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5
).map(e => e.tagName + "." + e.className)"""


def find_chromium() -> str | None:
    """$CHROMIUM, or the first browser of the family on PATH."""
    named = os.environ.get("CHROMIUM")
    found = [shutil.which(name) for name in ([named] if named else NAMES)]
    return next((path for path in found if path), None)


@contextlib.contextmanager
def chromium():
    """A headless browser; skips the test where there is none."""
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium: bash launch/browser.sh installs one, or set CHROMIUM=/path")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        # Its own sandbox cannot be had inside many containers; the pages are our own.
        with playwright.chromium.launch(executable_path=path, args=["--no-sandbox"]) as opened:
            yield opened
