"""A headless Chromium for tests of the page, which may ask this machine alone, and what tests do in it."""

import json
import re
import shutil
from urllib.parse import urlsplit

import pytest

from tests.serve.site import WAIT

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = api.expect
expect.set_options(timeout=1000 * WAIT)

HOSTILE = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
# counts what the browser refuses to run, and scripts that a text has smuggled in
WATCH = """
window.violations = [];
window.hacked = 0;
document.addEventListener("securitypolicyviolation", (event) => window.violations.push(event.violatedDirective));
"""


def chromium():
    """Return the path of Chromium; None where there is none."""
    return shutil.which("chromium")


class Guard:
    """What a browser context asked for, and what went wrong in its pages."""

    def __init__(self, context):
        self.foreign, self.errors = [], []
        context.add_init_script(WATCH)
        context.route("**/*", self._pass)
        context.on("console", lambda message: message.type in ("error", "warning") and self.errors.append(message.text))
        context.on("weberror", lambda error: self.errors.append(str(error.error)))

    def _pass(self, route):
        if urlsplit(route.request.url).hostname == "127.0.0.1":
            route.fallback()
        else:
            self.foreign.append(route.request.url)
            route.abort()

    def check(self, page, expected=()):
        """Assert that nothing went wrong but refusals of these statuses, and nobody else was asked."""
        assert self.foreign == []
        refusals = [f"the server responded with a status of {status}" for status in expected]
        assert [text for text in self.errors if not any(one in text for one in refusals)] == []
        assert page.evaluate("[window.violations, window.hacked]") == [[], 0]


@pytest.fixture(scope="module")
def browser():
    path = chromium()
    if path is None:
        pytest.skip("there is no chromium on this machine")
    with api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield made
        made.close()


@pytest.fixture
def page(browser):
    """A new page; `page.guard` notes whom it asks and what goes wrong."""
    context = browser.new_context()
    context.set_default_timeout(1000 * WAIT)
    guard = Guard(context)
    made = context.new_page()
    made.guard = guard
    yield made
    context.close()


def ask(page, model, prompt="the film was good", tokens=6):
    page.get_by_label("Model").fill(model)
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Most tokens").fill(str(tokens))
    page.get_by_role("button", name="Answer").click()


def ended(page):
    expect(page.locator("#progress")).to_contain_text("ended by")


def row(page, name):
    named = page.locator(".name", has_text=re.compile(f"^{re.escape(name)}$"))
    return page.locator("#adapters tbody tr").filter(has=named)


def enter(page, key):
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_label("Key", exact=True).press("Enter")


def refuse(page, path, status, code, **headers):
    """Let the server refuse a path, until the route is taken away."""
    body = json.dumps({"error": {"message": f"no, because {HOSTILE}", "type": "x", "param": None, "code": code}})
    page.route(path, lambda route: route.fulfill(status=status, body=body, headers=headers))


NAME_OF_FOCUS = """(() => {
  const one = document.activeElement;
  return one.getAttribute("aria-label") ?? one.labels?.[0]?.textContent ?? one.textContent;
})()"""

# WCAG's contrast of every text with what is behind it, 4.5 at least
CONTRASTS = r"""(() => {
  const parse = (text) => { const n = text.match(/[\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
  const light = (rgb) => { const [r, g, b] = rgb.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (one) => { for (; one; one = one.parentElement) {
    const color = parse(getComputedStyle(one).backgroundColor); if (color[3] === 1) return color; }
    return [255, 255, 255, 1]; };
  const low = []; let seen = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const one = walker.currentNode.parentElement;
    const shown = walker.currentNode.textContent.trim() && one.checkVisibility();
    if (!shown || one.closest(":disabled, noscript")) continue;
    const pair = [light(parse(getComputedStyle(one).color)), light(behind(one))].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    seen++;
    if (ratio < 4.5) low.push([one.className, walker.currentNode.textContent.slice(0, 30), ratio]);
  }
  return { seen, low };
})()"""
