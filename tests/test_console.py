"""The console: its files and state over HTTP, and the page in a real browser."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.api.console.routes import _read_files
from cluster.security.api_keys import hash_key
from cluster.security.authenticator import Authenticator
from tests.api_tools import ApiServer, serving
from tests.browser_tools import CONTRASTS, chromium, opened
from tests.engine_tools import make_config
from tests.models import DRAFTER, TARGET

pytestmark = pytest.mark.timeout(200)

KEY = "dspark_console_test"
WAIT_MS = 60_000
SOURCES = ("accepted", "recovered", "bonus", "target")
NARROW = {"width": 360, "height": 640}


@pytest.fixture(scope="module")
def server() -> Iterator[ApiServer]:
    config = make_config(TARGET, DRAFTER, max_model_len=512)
    with serving(config, chat_template="chatml") as server:
        server.call(name_routers(server))
        yield server


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """A server that asks for ``KEY``."""
    keys = tmp_path_factory.mktemp("keys") / "keys.yaml"
    keys.write_text(yaml.safe_dump({"keys": [{"name": "test", "sha256": hash_key(KEY)}]}))
    config = make_config(TARGET, max_model_len=128)
    with serving(config, router={"authenticator": Authenticator(str(keys))}) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


async def name_routers(server: ApiServer) -> None:
    router = server.router
    router.set_routers([("router-other", "10.0.0.9:1"), (router.router_id, server.grpc_address)])


def get(url: str, **headers: str) -> tuple[int, bytes, Any]:
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


# ------------------------------------------------------------------------------------ over HTTP


def test_the_page_and_its_files_are_served_and_strict(server: ApiServer) -> None:
    status, page, headers = get(f"{server.url}/console")
    assert status == 200
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in headers["Content-Security-Policy"]
    # Nothing that the policy forbids, and nothing of elsewhere.
    text = page.decode()
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=|https?:", text)
    named = set(re.findall(r'(?:src|href)="(console/[^"]+)"', text))
    assert named == {f"console/{name}" for name in _read_files() if name != "console.html"}
    for path in named:
        status, data, headers = get(f"{server.url}/{path}")
        assert status == 200
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert data == _read_files()[path.removeprefix("console/")]
        assert get(f"{server.url}/{path}", **{"If-None-Match": headers["ETag"]})[0] == 304
    assert get(f"{server.url}/console/nothing.js")[0] == 404
    assert get(f"{server.url}/console/")[1] == page  # by way of a redirect


def test_the_state_tells_routers_replicas_and_how_they_speculate(server: ApiServer) -> None:
    body = json.dumps({"prompt": "def f(x):", "temperature": 0, "max_tokens": 24}).encode()
    request = urllib.request.Request(
        f"{server.url}/v1/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60):
        pass
    deadline = time.monotonic() + 60  # a report may be half a second old
    while True:
        state = json.loads(get(f"{server.url}/console/state")[1])
        if state["replicas"][0]["num_output_tokens"] >= 24:
            break
        assert time.monotonic() < deadline
    assert {router["router_id"] for router in state["routers"]} == {
        "router-other",
        server.router.router_id,
    }
    (replica,) = state["replicas"]
    assert (replica["state"], replica["speculation_state"]) == ("ready", "on")
    assert replica["switch"]["mode"] == "speculative"
    assert replica["switch"]["seconds_in_mode"]["speculative"] > 0
    assert replica["switch"]["seconds_in_state"] > 0
    assert replica["speculation"]["num_accepted_tokens"] > 0
    assert state["has_chat_template"] is True
    assert "/console/state" in json.loads(get(f"{server.url}/openapi.json")[1])["paths"]


def test_with_keys_the_page_is_open_and_the_state_is_not(locked: ApiServer) -> None:
    status, page, _ = get(f"{locked.url}/console")
    assert status == 200
    assert b'data-api-key="needed"' in page
    assert get(f"{locked.url}/console/state")[0] == 401
    assert get(f"{locked.url}/console/state", Authorization="Bearer wrong")[0] == 401
    status, state, _ = get(f"{locked.url}/console/state", Authorization=f"Bearer {KEY}")
    assert status == 200
    assert json.loads(state)["has_chat_template"] is False


# ---------------------------------------------------------------------------------- in Chromium


def series(page: Any) -> list[str]:
    paths: list[str] = page.eval_on_selector_all(
        "#charts .series", "lines => lines.map(line => line.getAttribute('d'))"
    )
    return paths


def pressed_to(page: Any, selector: str) -> None:
    """Goes to an element as a keyboard does."""
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"Tab does not reach {selector}")


def done(page: Any) -> str:
    from playwright.sync_api import expect

    expect(page.locator("#progress")).to_contain_text("tokens/s with speculation", timeout=WAIT_MS)
    return str(page.inner_text("#progress"))


def sources_shown(page: Any, name: str) -> set[str]:
    return {
        source for source in SOURCES if page.locator(f"#{name}-text .token.{source}").count() > 0
    }


@pytest.mark.browser
def test_a_prompt_typed_by_keyboard_is_answered_in_colours(server: ApiServer, browser: Any) -> None:
    prompt = "def main(arguments):\n    # λ 🚀\n"
    with opened(browser, f"{server.url}/console") as (page, findings):
        pressed_to(page, "#prompt")
        page.keyboard.press("Control+a")
        page.keyboard.type(prompt)
        before = series(page)
        pressed_to(page, "#send")
        page.keyboard.press("Enter")
        assert done(page).endswith("The same tokens.")
        assert page.evaluate("document.activeElement.id") == "send"  # the focus is not lost
        text = page.text_content("#with-text")
        assert text.startswith(prompt)
        assert text == page.text_content("#without-text")
        assert sources_shown(page, "with") >= {"accepted", "recovered"}
        assert sources_shown(page, "without") == {"target"}
        # By colour, by the kind of line, and by title.
        looks = page.evaluate(
            """sources => sources.map((source) => {
              const style = getComputedStyle(document.querySelector(`.legend .${source}`));
              return [style.color, `${style.textDecorationLine} ${style.textDecorationStyle}`];
            })""",
            list(SOURCES),
        )
        assert len({color for color, _ in looks}) == len({line for _, line in looks}) == 4
        assert page.locator("#with-text .token:not([title])").count() == 0
        figures = page.inner_text("#with-figures")
        assert re.search(r"tokens\n96\nspeed\n[\d.]+ tokens/s\nfirst token\n\d+ ms", figures)
        assert float(re.search(r"acceptance length\n([\d.]+)", figures)[1]) > 1.5  # type: ignore[index]
        deadline = time.monotonic() + 120
        while not all(a != b for a, b in zip(before, series(page), strict=True)):
            assert time.monotonic() < deadline, "a chart does not move"
            # An answer may be over between two looks of the console at the load.
            page.locator("#send").press("Enter")
            time.sleep(1)
        assert findings.errors == []
        assert all(url.startswith(server.url) for url in findings.urls)


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.timed
def test_first_paint_takes_less_than_a_second(server: ApiServer, browser: Any) -> None:
    times = []
    for _ in range(3):  # whatever else this machine does at a moment
        with opened(browser, f"{server.url}/console") as (page, _):
            page.wait_for_selector("#replicas h3")
            paints = page.evaluate("performance.getEntriesByType('paint').map(e => e.startTime)")
            assert len(paints) == 2
            times.append(max(paints))
    print(f"first contentful paint: {min(times):.0f} ms, at worst {max(times):.0f} ms")
    assert min(times) < 1000


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_page_fits_and_can_be_read(server: ApiServer, browser: Any, scheme: str) -> None:
    context = {"viewport": NARROW, "color_scheme": scheme, "reduced_motion": "reduce"}
    with opened(browser, f"{server.url}/console", **context) as (page, findings):
        page.focus("#prompt")
        page.keyboard.press("Control+Enter")
        done(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
        contrasts = page.evaluate(CONTRASTS)
        assert {"span.token accepted", "span.token recovered", "th."} <= contrasts.keys()
        # What is disabled may be faint.
        assert {name: c for name, c in contrasts.items() if c < 4.5} == {}
        assert (
            page.evaluate(
                "getComputedStyle(document.querySelector('.answer .token')).animationName"
            )
            == "none"
        )
        assert findings.errors == []


@pytest.mark.browser
@pytest.mark.slow
def test_every_control_has_a_name_and_shows_that_it_is_focused(
    server: ApiServer, browser: Any
) -> None:
    with opened(browser, f"{server.url}/console") as (page, _):
        page.wait_for_selector("#replicas h3")
        unnamed = page.evaluate(
            """() => [...document.querySelectorAll("input, select, textarea, button")]
              .filter((node) => !node.labels?.length && !node.textContent.trim())
              .map((node) => node.id)"""
        )
        assert unnamed == []
        seen = []
        for _ in range(40):
            page.keyboard.press("Tab")
            seen.append(
                page.evaluate(
                    """() => {
                      const node = document.activeElement;
                      const style = getComputedStyle(node);
                      return [node.id || node.getAttribute("aria-label") || node.className,
                              style.outlineStyle, parseFloat(style.outlineWidth)];
                    }"""
                )
            )
        names = [name for name, _, _ in seen]
        stops = ["skip", "pause", "prompt", "kind", "max-tokens", "temperature", "seed", "together"]
        assert [name for name in names if name in stops][: len(stops)] == stops
        assert {"send", "with-text", "without-text", "Routers"} <= {*names}
        inside = [(name, style, width) for name, style, width in seen if name]
        assert all(style == "solid" and width >= 2 for _, style, width in inside)


@pytest.mark.browser
@pytest.mark.slow
def test_stop_ends_the_request_and_errors_are_told(server: ApiServer, browser: Any) -> None:
    from playwright.sync_api import expect

    with opened(browser, f"{server.url}/console") as (page, findings):
        page.fill("#max-tokens", "480")
        page.select_option("#kind", "chat")
        page.click("#send")
        expect(page.locator("#with-text")).not_to_be_empty(timeout=WAIT_MS)
        page.click("#stop")
        expect(page.locator("#progress")).to_have_text("Stopped.")
        deadline = time.monotonic() + 60
        while server.engine_loop.load().num_running:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert findings.errors == []
        page.fill("#seed", str(10**17 * 99))
        page.click("#send")
        expect(page.locator("#prompt-error")).to_contain_text("seed", timeout=WAIT_MS)
        page.fill("#seed", "3")
        page.fill("#temperature", "0.8")
        page.fill("#max-tokens", "40")
        page.check("#together")
        page.click("#send")
        assert done(page).endswith("The same tokens.")
        assert page.inner_text("#prompt-error") == ""


@pytest.mark.browser
@pytest.mark.slow
def test_updates_pause_and_come_back_after_the_router_was_away(
    server: ApiServer, browser: Any
) -> None:
    from playwright.sync_api import expect

    with opened(browser, f"{server.url}/console") as (page, findings):
        page.wait_for_selector("#replicas h3")
        page.click("#pause")
        assert page.get_attribute("#pause", "aria-pressed") == "true"
        page.wait_for_timeout(1500)
        num_asked = len(findings.urls)
        page.wait_for_timeout(2500)
        assert len(findings.urls) == num_asked
        page.route("**/console/state", lambda route: route.abort())
        page.click("#pause")
        expect(page.locator("#notice")).to_contain_text("No state from the router")
        page.unroute("**/console/state")
        expect(page.locator("#notice")).to_be_hidden()
        expect(page.locator("#replicas h3")).to_have_text("Replica replica-0: ready")


@pytest.mark.browser
@pytest.mark.slow
def test_with_keys_the_page_asks_for_one_and_keeps_it_nowhere(
    locked: ApiServer, browser: Any
) -> None:
    from playwright.sync_api import expect

    with opened(browser, f"{locked.url}/console") as (page, findings):
        assert page.evaluate("document.activeElement.id") == "key"
        assert findings.errors == []  # it has not even tried
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-error")).to_contain_text("not known")
        page.keyboard.type(KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#summary")).to_contain_text("1 of 1 replica ready")
        page.fill("#max-tokens", "8")
        page.click("#send")
        expect(page.locator("#progress")).to_contain_text("The same tokens.", timeout=WAIT_MS)
        assert page.evaluate(
            "[localStorage.length, sessionStorage.length, document.cookie, location.href]"
        ) == [0, 0, "", f"{locked.url}/console"]
        assert page.input_value("#key") == ""
        page.reload()
        expect(page.locator("#key-form")).to_be_visible()


def test_the_package_data_names_the_consoles_files() -> None:
    """Whoever installs a wheel has them too."""
    root = Path(__file__).parents[1]
    text = (root / "pyproject.toml").read_text()
    for name in _read_files():
        assert f'"*.{name.rpartition(".")[2]}"' in text
