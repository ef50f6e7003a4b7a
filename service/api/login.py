"""Pages with a key: a form that keeps it in a cookie, for a browser cannot send it otherwise.

Links, images and event streams of a page carry no `Authorization`. The cookie is hidden from
scripts, goes to this site alone, only with requests that its own pages make, and ends with the
browser's session; revoking the key ends it everywhere.
"""

from __future__ import annotations

from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from service.api.bodies import whole
from service.api.guard import COOKIE
from service.api.pages import page
from service.api.state import Here
from service.errors import Unauthorized

router = APIRouter(include_in_schema=False)

_FORM_BYTES = 4096


@router.get("/login")
async def ask(next: str = "/") -> Response:
    """The form."""
    return page("login", next=_inside(next), refused=None)


@router.post("/login")
async def login(request: Request, service: Here) -> Response:
    """Keep a valid key and go on to where the person wanted to go."""
    body = await whole(request, _FORM_BYTES, service.settings.body_idle_seconds, "the form")
    form = parse_qs(body.decode("utf-8", "replace"))
    key, target = form.get("key", [""])[0].strip(), _inside(form.get("next", ["/"])[0])
    try:
        service.keyring.identify(key)
    except Unauthorized as error:
        refused = page("login", next=target, refused=error.detail)
        refused.status_code = 401
        return refused
    answer = RedirectResponse(target, 303)
    secure = request.url.scheme == "https"
    answer.set_cookie(COOKIE, key, httponly=True, samesite="strict", secure=secure)
    return answer


@router.post("/logout")
async def logout() -> Response:
    """Forget the key."""
    answer = RedirectResponse("/login", 303)
    answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return answer


def _inside(target: str) -> str:
    """A path of this site, whatever the address bar was made to say."""
    inside = target.startswith("/") and not target.startswith(("//", "/\\"))
    return target if inside and target.isprintable() else "/"
