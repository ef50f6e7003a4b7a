from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from tests.api import tiny
from tests.running import RunningServer
from tests.web.watched import XSS, Watched

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
PATIENCE_MS = 60_000  # a shared machine may be slow; nothing here waits longer than it must
_ARGUMENTS = [
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Chromium, with a user data folder of its own.

    Playwright keeps an event loop running in this thread while it lives: for the whole session, no
    test elsewhere in the process could start one of its own.
    """
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, server: RunningServer) -> Iterator[Callable[..., Watched]]:
    """Opens watched pages; what they must never do is checked when the test ends."""
    opened: list[Watched] = []

    def make(
        width: int = 1280, theme: str = "light", reduced: bool = True, url: str = server.url
    ) -> Watched:
        context = browser.new_context(
            base_url=url,
            viewport={"width": width, "height": 900},
            color_scheme=theme,
            reduced_motion="reduce" if reduced else "no-preference",
        )
        context.set_default_timeout(PATIENCE_MS)
        opened.append(Watched(context.new_page(), url))
        return opened[-1]

    yield make
    for each in opened:
        each.page.context.close()
    for each in opened:
        each.check()


@pytest.fixture
def web(open_page: Callable[..., Watched]) -> Watched:
    """One watched page of desktop width in the light theme."""
    return open_page()


@pytest.fixture(scope="session")
def shown(server: RunningServer) -> str:
    """A model for looking at, with labels that are markup. Not to be changed."""
    labels = [XSS, "</span><script>window.pwned=1</script>", "cat", "dog", "eel"]
    with httpx.Client(base_url=server.url, timeout=120) as client:
        put(client, "web-shown", labels=labels)
    return "web-shown"


def put(http: httpx.Client, name: str, seed: int = 0, **config: object) -> None:
    """Upload the tiny network and wait until it serves, however busy the machine is."""
    answer = http.post(
        f"/v1/models/{name}/versions",
        files={"checkpoint": ("tiny.pth", tiny.checkpoint(seed))},
        data={"config": json.dumps(tiny.CONFIG | {"backend": "torch"} | config)},
        headers={"Prefer": "wait=100"},
    )
    assert answer.status_code in (201, 202), answer.text
    while (state := http.get(answer.headers["location"]).json()["state"]) != "ready":
        assert state in ("queued", "converting")
        time.sleep(0.2)
