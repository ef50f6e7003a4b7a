from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import expect

from service.store.keys import Scope
from tests.api.conftest import catalog_of
from tests.running import running
from tests.web.watched import Watched


def test_the_pages_of_a_locked_service_ask_for_a_key(
    open_page: Callable[..., Watched], tmp_path: Path
) -> None:
    """No key, a wrong one, one that may only read, and the way out."""
    catalog = catalog_of(tmp_path)
    key, _ = catalog.keys.create("reader", (Scope.READ,))
    catalog.close()
    with running(tmp_path, {"FOLDSERVE_AUTH": "keys"}) as locked:
        web = open_page(url=locked.url)
        page = web.page
        web.refusals = {401, 403}
        page.goto("/")
        page.wait_for_url(re.compile(r"/login\?next=/$"))
        expect(page.get_by_label("API key")).to_be_focused()

        page.get_by_label("API key").fill("fsk_wrong")
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_role("alert")).to_be_visible()

        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Log in").click()
        page.wait_for_url(f"{locked.url}/")
        expect(page.locator("#file")).to_be_attached()
        assert key not in page.evaluate("document.cookie")  # out of reach of scripts
        assert key not in page.content()

        page.locator("#file").set_input_files(
            {"name": "a.pth", "mimeType": "application/octet-stream", "buffer": b"x"}
        )
        page.get_by_role("button", name="Upload and fold").click()
        expect(page.locator(".conversion .problem")).to_contain_text("write")

        page.get_by_role("button", name="Log out").click()
        page.goto("/service")
        page.wait_for_url(re.compile(r"/login\?next=/service$"))
