from __future__ import annotations

import pytest
from starlette.responses import Response

from service.api.known import KnownResponse


@pytest.mark.parametrize(
    ("content", "media_type", "headers"),
    [
        (b"{}", "application/json", ()),
        (b"", "application/x-npy", (("Foldserve-Version", "3"),)),
        (b"\x00" * 10, "application/octet-stream", (("A", "1"), ("B-C", "é"))),
    ],
)
def test_it_is_the_response_that_starlette_would_make(
    content: bytes, media_type: str, headers: tuple[tuple[str, str], ...]
) -> None:
    wanted = Response(content, headers=dict(headers), media_type=media_type)
    for _ in range(2):  # made, and remembered
        found = KnownResponse(content, media_type, headers)
        assert sorted(found.raw_headers) == sorted(wanted.raw_headers)
        assert (found.status_code, found.body) == (200, content)
        found.raw_headers.append((b"x-request-id", b"1"))  # every answer has a list of its own


def test_alike_heads_of_other_lengths_do_not_mix() -> None:
    lengths = [
        dict(KnownResponse(bytes(n), "a/b", ()).raw_headers)[b"content-length"] for n in (1, 2, 1)
    ]
    assert lengths == [b"1", b"2", b"1"]
