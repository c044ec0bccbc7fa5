"""The page at `/`: what every browser is told about it, and (slow) a real one that uses it."""

import re
import shutil
from base64 import b64encode
from collections.abc import Iterator
from hashlib import sha256
from html.parser import HTMLParser

import pytest

from nanochat_cli.serve.page import PAGE
from nanochat_cli.serve.rules import Rules
from tests.serve.chromium import Chromium, chromium
from tests.serve.live import Live, client, live, tiny_served

TEXT = PAGE.read_text(encoding="utf-8")
VOID = {"meta", "link", "input"}


class Outline(HTMLParser):
    """Elements with their attributes; AssertionError for one that is closed where another is open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, str] = {}
        self.feed(TEXT)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.inside[self.open[-1]] = self.inside.get(self.open[-1], "") + data


def test_the_page_is_one_small_file_that_parses_and_loads_nothing_from_elsewhere():
    assert len(TEXT.splitlines()) < 200
    outline = Outline()
    assert outline.open == []
    assert "//" not in re.sub(r"(^|\s)// .*", "", TEXT), "an address, or an undue comment"
    for tag, attributes in outline.elements:
        assert "src" not in attributes
        assert (attributes.get("href") or "data:").startswith("data:")
        assert not [name for name in attributes if name.startswith("on") or name == "style"], f"inline: {tag}"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Storage|cookie", TEXT)


def test_every_field_has_a_label_and_every_element_that_the_script_names_is_there():
    elements = Outline().elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    labelled = {attributes["for"] for tag, attributes in elements if tag == "label"}
    assert len(ids) == len(set(ids))
    assert {attributes["id"] for tag, attributes in elements if tag in ("input", "textarea")} == labelled
    named = set(re.findall(r"\$\('([\w-]+)'\)", TEXT))
    assert named
    assert named <= set(ids)


def test_the_policy_allows_this_script_and_this_style_and_nothing_else():
    inside = Outline().inside
    with live() as server, client(server) as http:
        answer = http.get("/")
    assert (answer.status_code, answer.text) == (200, TEXT)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    for name, tag in (("script-src", "script"), ("style-src", "style")):
        assert policy.pop(name) == f"'sha256-{b64encode(sha256(inside[tag].encode()).digest()).decode()}'"
    assert policy == {
        **{"default-src": "'none'", "connect-src": "'self'", "img-src": "data:"},
        **{"base-uri": "'none'", "form-action": "'none'", "frame-ancestors": "'none'"},
    }


def test_the_page_needs_no_key_and_what_it_asks_does():
    with live(rules=Rules(None, "secret")) as server:
        with client(server) as http:
            assert http.get("/").status_code == 200
            assert http.get("/props").status_code == 401
            assert http.post("/", json={}).status_code == 405
        with client(server, Authorization="Bearer secret") as http:
            props = http.get("/props").json()
    assert {"model_alias", "chat_template", "infill"} <= props.keys()
    assert props["default_generation_settings"]["n_ctx"] == 256


@pytest.mark.parametrize(("fim", "tokens", "said"), [(True, True, True), (False, True, False), (True, False, False)])
def test_what_the_model_can_do_with_the_text_after_the_cursor_is_said(fim, tokens, said):
    served = tiny_served()
    object.__setattr__(served, "fim", fim)
    if not tokens:
        served.tokenizer.special_tokens.pop("<|fim_middle|>")
    with live(served) as server, client(server) as http:
        assert http.get("/props").json()["infill"] is said


# -- a browser ---------------------------------------------------------------------------------------------------------

needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")


@pytest.fixture
def browser() -> Iterator[Chromium]:
    with chromium() as browser:
        yield browser


def opened(browser: Chromium, server: Live) -> None:
    browser.open(server.url)
    browser.wait("!$('main').hidden || !$('door').hidden")


@pytest.mark.slow
@needs_chromium
def test_a_browser_writes_at_the_cursor_and_says_how_fast(browser):
    with live(tiny_served(template=None)) as server:
        with client(server) as http:
            body = {"input_prefix": "def f(", "input_suffix": "):\n", "n_predict": 8, "temperature": 0}
            expected = http.post("/infill", json=body).json()["content"].replace("\r", "")
        opened(browser, server)
        assert browser.run("document.getElementById('ways').hidden") is True
        browser.set({"most": "8", "heat": "0"})
        browser.set({"text": "def f():\n"})
        browser.run("document.getElementById('text').setSelectionRange(6, 6)")
        browser.click("go")
        browser.wait("/^\\d+ tokens, [\\d.]+ tokens.s$/.test($('state').textContent) && !$('go').disabled")
        assert browser.run("document.getElementById('text').value") == f"def f({expected}):\n"
        assert browser.run("document.getElementById('text').selectionStart") == len(f"def f({expected}")
        assert browser.complaints == []


@pytest.mark.slow
@needs_chromium
def test_a_browser_talks_stops_and_begins_anew(browser):
    with live() as server:
        opened(browser, server)
        browser.set({"most": "200", "heat": "1", "say": "x"})
        browser.click("go")
        browser.wait("$('turns').textContent.length > 20")
        browser.click("halt")
        browser.wait("!$('go').disabled")
        assert "token" in browser.run("document.getElementById('state').textContent")
        assert browser.run("document.querySelectorAll('#turns div').length") == 2
        browser.click("anew")
        assert browser.run("document.getElementById('turns').children.length") == 0
        browser.click("to-text")
        assert browser.run("document.activeElement.id") == "text"
        assert browser.complaints == []


@pytest.mark.slow
@needs_chromium
def test_a_browser_is_asked_for_the_key_only_where_there_is_one(browser):
    with live(rules=Rules(None, "secret")) as server:
        with client(server):
            opened(browser, server)
        browser.wait("!$('door').hidden && $('main').hidden")
        for key, came in (
            ("wrong", "$('state').textContent.includes('wrong API key')"),
            ("secret", "!$('main').hidden"),
        ):
            browser.set({"key": key})
            browser.run("document.getElementById('door').requestSubmit()")
            browser.wait(came)
    with live() as server:
        opened(browser, server)
        assert browser.run("document.getElementById('door').hidden") is True


@pytest.mark.slow
@needs_chromium
def test_the_page_is_dark_where_the_reader_wants_it(browser):
    with live() as server:
        for scheme, dark in (("light", False), ("dark", True)):
            browser.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            opened(browser, server)
            colour = browser.run("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", colour)[:3])) < 300) is dark
