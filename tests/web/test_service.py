"""The service page against real traffic, and what it computes of Prometheus' text."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from playwright.sync_api import expect

from tests.web.test_upload import picture
from tests.web.watched import Watched


def figure(web: Watched, name: str) -> Any:
    return web.page.locator("#now div", has_text=name).locator("dd")


def test_it_shows_what_happens(web: Watched, shown: str, http: httpx.Client) -> None:
    web.go("/service")
    expect(figure(web, "Predictions a second")).to_have_text("\u2013")
    expect(web.page.locator("#loaded")).to_contain_text(shown)
    expect(web.page.locator("#process")).to_contain_text("Worker")
    for name in http.get("/health").json()["sandbox"]:
        expect(web.page.locator("#sandbox")).to_contain_text(
            name.replace("_", " "), ignore_case=True
        )
    for _ in range(5):
        predict = f"/v1/models/{shown}/predict"
        kind = {"Content-Type": "image/png"}
        assert http.post(predict, content=picture(), headers=kind).status_code == 200
    expect(figure(web, "p50, last minute")).to_contain_text("s")
    expect(figure(web, "Predictions a second")).not_to_have_text("\u2013")
    for name in ("Memory", "Weights loaded"):
        expect(figure(web, name)).to_contain_text("B")


def test_a_service_that_is_gone_is_named_and_found_again(web: Watched) -> None:
    web.unanswered = True
    web.go("/service")
    web.page.route("**/health", lambda route: route.abort())
    expect(web.page.locator("#service-problem")).to_contain_text("did not answer")
    web.page.unroute("**/health")
    expect(web.page.locator("#service-problem .problem")).to_have_count(0)


TEXT = """# HELP t_seconds Time.
t_seconds_bucket{le="0.1",route="/v1/models/{name}/predict"} 10.0
t_seconds_bucket{le="1.0",route="/v1/models/{name}/predict"} 30.0
t_seconds_bucket{le="+Inf",route="/v1/models/{name}/predict"} 40.0
t_seconds_bucket{le="+Inf",route="/health"} 7.0
odd{name="a\\"b\\\\c\\nd"} 1e-3
plain 4
"""


EXPECTED: dict[str, Any] = {
    "m.total(all, 'plain')": 4,
    "m.total(all, 'odd', (labels) => labels.name === 'a\"b\\\\c\\nd')": 0.001,
    "m.quantile(seen, null, 0.5)": 0.55,
    "m.quantile(seen, null, 0.1)": 0.04,
    "m.quantile(seen, null, 0.99)": 1,  # beyond the last bound
    "m.quantile(seen, seen, 0.5)": None,  # nothing happened since
}


def test_the_exposition_is_read(web: Watched) -> None:
    web.page.goto("/problems")
    script = f"""async (text) => {{
      const m = await import("/static/js/exposition.js");
      const all = m.samples(text);
      const seen = m.buckets(all, "t_seconds", (labels) => labels.route.endsWith("predict"));
      return [{", ".join(EXPECTED)}];
    }}"""
    found = web.page.evaluate(script, TEXT)
    assert found == [pytest.approx(value) for value in EXPECTED.values()]
