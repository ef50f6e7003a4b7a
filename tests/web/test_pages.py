"""The pages as HTTP answers: whole, strict, small, and from nowhere else."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import httpx
import pytest

import service.web
from service.api import problems

PAGES = ["/", "/models/tiny", "/service", "/login", "/docs", "/problems", "/problems/queue_full"]
STATIC = Path(service.web.__file__).parent / "static"
SCRIPTS = sorted((STATIC / "js").glob("*.js"))


def outside(html: str, own: str) -> list[str]:
    """Addresses that a browser would load from elsewhere."""
    loaded = re.findall(r"<(?:script|img|link|iframe|source)\b[^>]*?(?:src|href)=\"([^\"]+)", html)
    return [url for url in loaded if "//" in url and not url.startswith(own)]


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_whole_and_load_nothing_from_elsewhere(http: httpx.Client, page: str) -> None:
    answer = http.get(page)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "require-trusted-types-for 'script'" in policy
    assert "unsafe" not in policy
    assert " style=" not in answer.text, "the policy would not apply it"
    assert re.findall(r"<script(?![^>]* src=\")", answer.text) == [], "nor would it run these"
    assert re.findall(r"<[^>]+\son\w+=", answer.text) == [], "nor these"
    assert outside(answer.text, str(http.base_url)) == []
    files = re.findall(r"<(?:link|img|script)\b[^>]*?(?:src|href)=\"([^\"]+)", answer.text)
    assert files
    for link in set(files):
        assert http.get(link).status_code == 200, link
    for link in set(re.findall(r"<a [^>]*?href=\"(/[^\"]*)", answer.text)):
        assert http.get(link).status_code == 200, link


def test_the_check_sees_what_comes_from_elsewhere() -> None:
    html = '<script src="https://cdn.example/x.js"></script><link rel="a" href="//b/c">'
    assert outside(html, "http://127.0.0.1") == ["https://cdn.example/x.js", "//b/c"]


def test_pages_of_data_hold_no_data(http: httpx.Client) -> None:
    """They may be shown to anybody; their scripts ask for the rest."""
    assert http.get("/models/never-made").text == http.get("/models/tiny").text.replace(
        "tiny", "never-made"
    )


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "A", "a%20b", "a" * 64])
def test_a_page_has_the_name_of_a_model(http: httpx.Client, name: str) -> None:
    answer = http.get(f"/models/{name}")
    assert answer.status_code in (404, 422)
    assert answer.headers["content-type"] == problems.MEDIA_TYPE


def test_files_are_compressed_and_asked_about_again(http: httpx.Client) -> None:
    answer = http.get("/static/vendor/uplot/uPlot.iife.min.js")
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.headers["cache-control"] == "no-cache"
    again = http.get(
        "/static/vendor/uplot/uPlot.iife.min.js", headers={"If-None-Match": answer.headers["etag"]}
    )
    assert again.status_code == 304


def test_the_pages_stay_small() -> None:
    """A page loads at most this much; the styles and scripts of all pages are counted here."""
    texts = [*STATIC.rglob("*.css"), *STATIC.rglob("*.js")]
    assert sum(len(gzip.compress(path.read_bytes())) for path in texts) < 80_000


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_make_no_markup_of_strings(script: Path) -> None:
    text = script.read_text()
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "style=",
    ):
        assert way not in text
    assert text.startswith("//"), "each script says what it is for"


def test_files_of_others_come_with_their_licence() -> None:
    folders = [path for path in (STATIC / "vendor").iterdir() if path.is_dir()]
    assert folders
    for folder in folders:
        assert "Permission is hereby granted" in (folder / "LICENSE").read_text()
        assert folder.name in (STATIC / "vendor/README.md").read_text()


def test_docs_show_every_operation(http: httpx.Client) -> None:
    page = http.get("/docs").text
    for path in http.get("/openapi.json").json()["paths"]:
        assert f"<code>{path}</code>" in page
    assert "`" not in page  # names in the texts are marked up, not quoted
    assert page.count('class="method patch"') == 1


def test_every_code_has_its_place(http: httpx.Client) -> None:
    page = http.get("/problems").text
    for row in problems.catalogue():
        assert f'id="{row["code"]}"' in page
        assert http.get(f"/problems/{row['code']}").status_code == 200
    assert http.get("/problems/nonsense").status_code == 404
