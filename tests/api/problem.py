"""What every refusal must look like."""

from __future__ import annotations

from typing import Any

import httpx


def problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The problem document, after checking everything that RFC 9457 and the design ask of it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["status"] == status
    assert body["code"] == code, body
    assert body["type"] == f"/problems/{code}"
    assert body["instance"] == answer.request.url.path
    for words in ("title", "detail", "remedy"):
        assert isinstance(body[words], str)
        assert body[words]
    assert "Traceback" not in answer.text
    return body
