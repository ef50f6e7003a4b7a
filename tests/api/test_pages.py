from __future__ import annotations

import re

import httpx
import pytest

from service.api import problems

PAGES = ["/", "/docs", "/problems", "/problems/queue_full"]


def outside(html: str, own: str) -> list[str]:
    """Addresses that a browser would load from elsewhere."""
    loaded = re.findall(r"<(?:script|img|link|iframe|source)\b[^>]*?(?:src|href)=\"([^\"]+)", html)
    return [url for url in loaded if "//" in url and not url.startswith(own)]


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_whole_and_load_nothing_from_elsewhere(
    http: httpx.Client, model: str, page: str
) -> None:
    answer = http.get(page)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "<script" not in answer.text
    assert " style=" not in answer.text, "the policy would not apply it"
    assert outside(answer.text, str(http.base_url)) == []
    for link in set(re.findall(r"<(?:link|img)\b[^>]*?(?:src|href)=\"([^\"]+)", answer.text)):
        assert http.get(link).status_code == 200
    for link in set(re.findall(r"<a [^>]*?href=\"(/[^\"]*)", answer.text)):
        assert http.get(link).status_code == 200, link


def test_the_check_sees_what_comes_from_elsewhere() -> None:
    html = '<script src="https://cdn.example/x.js"></script><link rel="a" href="//b/c">'
    assert outside(html, "http://127.0.0.1") == ["https://cdn.example/x.js", "//b/c"]


def test_status_shows_models_and_refusals_safely(http: httpx.Client, model: str) -> None:
    http.post(
        "/v1/models/page-wrong/versions",
        params={"filename": "<script>alert(1)</script>.pth"},
        content=b"x",
        headers={"Content-Type": "application/octet-stream", "Prefer": "wait=60"},
    )
    page = http.get("/").text
    assert f">{model}</a>" in page
    assert "Blocks fused" in page
    assert "The file is not a checkpoint" in page
    assert "<script>" not in page


def test_docs_show_every_operation(http: httpx.Client) -> None:
    page = http.get("/docs").text
    for path in http.get("/openapi.json").json()["paths"]:
        assert f"<code>{path}</code>" in page


def test_every_code_has_its_place(http: httpx.Client) -> None:
    page = http.get("/problems").text
    for row in problems.catalogue():
        assert f'id="{row["code"]}"' in page
        assert http.get(f"/problems/{row['code']}").status_code == 200
    assert http.get("/problems/nonsense").status_code == 404
