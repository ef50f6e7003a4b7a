"""Keyboard, screen reader, contrast, themes, narrow screens; and that the watch sees."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.web.watched import Watched


def pages(shown: str) -> list[str]:
    return ["/", f"/models/{shown}", "/service", "/docs", "/problems", "/login"]


def violations(web: Watched, *rules: str) -> list[str]:
    """What axe-core finds wrong on the page as it is shown now, by all rules or those named."""
    options = {"runOnly": list(rules)} if rules else None
    found = Axe().run(web.page, options=options).response["violations"]
    return [f"{each['id']}: {node['html'][:200]}" for each in found for node in each["nodes"]]


@pytest.mark.parametrize(("theme", "rules"), [("light", ()), ("dark", ("color-contrast",))])
def test_pages_are_accessible_in_both_themes(
    open_page: Callable[..., Watched], shown: str, theme: str, rules: tuple[str, ...]
) -> None:
    web = open_page(theme=theme)
    for path in pages(shown):
        web.go(path)
        assert violations(web, *rules) == [], path


def test_axe_sees_what_is_wrong(open_page: Callable[..., Watched]) -> None:
    web = open_page()
    web.go("/problems")
    web.page.evaluate(
        "document.querySelector('h1').replaceChildren(document.createElement('button'))"
    )
    assert any("button-name" in each for each in violations(web))
    web.page.evaluate("document.querySelector('.lead').style.color = '#ccc'")
    assert any("color-contrast" in each for each in violations(web, "color-contrast"))


@pytest.mark.parametrize("width", [360, 768])
def test_nothing_is_wider_than_the_screen(
    open_page: Callable[..., Watched], shown: str, width: int
) -> None:
    web = open_page(width=width)
    for path in pages(shown):
        web.go(path)
        assert web.page.evaluate("document.documentElement.scrollWidth") <= width, path


def test_the_theme_is_chosen_and_remembered(open_page: Callable[..., Watched]) -> None:
    web = open_page(theme="light")
    ground = "getComputedStyle(document.body).backgroundColor"
    web.go("/")
    light = web.page.evaluate(ground)
    button = web.page.get_by_role("button", name="Theme: system")
    button.focus()
    web.page.keyboard.press("Enter")
    web.page.keyboard.press("Enter")
    expect(web.page.get_by_role("button", name="Theme: dark")).to_be_focused()
    dark = web.page.evaluate(ground)
    assert dark != light
    web.go("/service")
    assert web.page.evaluate(ground) == dark
    web.page.get_by_role("button", name="Theme: dark").click()
    assert web.page.evaluate(ground) == light


def test_the_keyboard_is_enough(web: Watched, shown: str) -> None:
    page = web.page
    web.go(f"/models/{shown}")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate("document.activeElement.ariaLabel ?? document.activeElement.textContent")
        )
        if page.evaluate("document.activeElement.matches('.block')"):
            break
    assert "Version 1" in seen
    assert "Delete version 1" in seen
    first = page.evaluate("document.activeElement.ariaLabel")
    assert first.startswith("stage0, fused from 5 operators")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")  # the stage's summary closes it
    expect(page.locator(".stage").first).not_to_have_attribute("open", "")


def test_progress_is_announced(web: Watched) -> None:
    web.go("/")
    web.page.locator("#file").set_input_files(
        {"name": "web-announced.pth", "mimeType": "application/octet-stream", "buffer": b"x"}
    )
    expect(web.page.get_by_role("button", name="Upload and fold")).to_be_focused()
    web.page.keyboard.press("Enter")
    status = web.page.locator("#announcer")
    expect(status).to_contain_text("web-announced version 1 was rejected")
    assert status.get_attribute("role") == "status"


def test_the_policy_stops_markup_and_scripts_and_the_watch_sees_it(web: Watched) -> None:
    web.go("/problems")
    blocked = web.page.evaluate(
        """() => {
          try {
            document.body.innerHTML = "<img src=x onerror='window.pwned=1'>";
            return false;
          } catch {
            return true;
          }
        }"""
    )
    assert blocked
    web.page.evaluate(
        "document.body.append(Object.assign(document.createElement('a'), {style: ''}))"
    )
    web.page.evaluate(
        "() => { const s = document.createElement('script'); s.append('window.pwned=1');"
        " document.body.append(s); }"
    )
    assert web.page.evaluate("window.pwned") is None
    assert web.complaints, "a blocked script leaves a complaint"
    web.page.evaluate("fetch('https://elsewhere.invalid/').catch(() => {})")
    assert any("elsewhere" in each for each in [*web.complaints, *web.requests])
    with pytest.raises(AssertionError):
        web.check()
    web.complaints.clear()
    web.requests.clear()
