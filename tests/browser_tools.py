"""A real Chromium, and what its page did that it should not have."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

CHROMIUM = os.environ.get("DSPARK_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@dataclass
class Findings:
    """Of one page: errors of its console and scripts, and every address it asked for."""

    errors: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser of playwright's, with the Chromium of this machine."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser: Any, url: str, **context: Any) -> Iterator[tuple[Any, Findings]]:
    """A page at ``url`` in a fresh profile, with what is found of it while it is open."""
    findings = Findings()
    with browser.new_context(**context) as profile:
        page = profile.new_page()

        def on_console(message: Any) -> None:
            if message.type in ("error", "warning"):
                findings.errors.append(message.text)

        page.on("console", on_console)
        page.on("pageerror", lambda error: findings.errors.append(str(error)))
        page.on("request", lambda request: findings.urls.append(request.url))
        page.goto(url)
        yield page, findings


# Contrasts (WCAG 2) of every piece of text that is seen, against the ground behind it.
CONTRASTS = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const color = channels(getComputedStyle(node).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const found = {};
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility()) continue;
    const style = getComputedStyle(node);
    const ink = channels(node instanceof SVGElement ? style.fill : style.color);
    const [high, low] = [light(ink), light(ground(node))].sort((a, b) => b - a);
    const name = `${node.tagName.toLowerCase()}.${node.getAttribute("class") ?? ""}`;
    found[name] = Math.min(found[name] ?? 99, (high + 0.05) / (low + 0.05));
  }
  return found;
}"""
