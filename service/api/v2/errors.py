"""Errors as the protocol has them: an object with one member, `error`.

The stable code of Foldserve's problem documents is in a header of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from starlette.responses import Response

from service.api.encoding import json_bytes

PREFIX: Final = "/v2"
CODE: Final = "Foldserve-Code"


def speaks_v2(path: str) -> bool:
    """Whether `path` belongs to the protocol, so that its errors have the protocol's form."""
    return path == PREFIX or path.startswith(f"{PREFIX}/")


def response(problem: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    """A problem document in the protocol's form; what RFC 9457 calls 422 is 400 here."""
    status = 400 if problem["status"] == 422 else problem["status"]
    text = f"{problem['detail']} {problem['remedy']}"
    return Response(
        json_bytes({"error": text}),
        status_code=status,
        headers={**(headers or {}), CODE: problem["code"]},
        media_type="application/json",
    )
