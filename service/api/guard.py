"""Who is let in: the host name, the origin, the API key and the rate, before a route sees anything.

Plain ASGI that reads the request's head alone, so a refusal costs microseconds, and of a body at
most what came within the moment that a small one is waited for.

Without keys a service on loopback is open to everything that runs on the machine, browsers
included, and a browser runs strangers' pages. Two checks keep those out. A page that sends requests
across sites is known by `Origin` and `Sec-Fetch-Site`, which scripts cannot forge. A page whose own
name was pointed at this machine (DNS rebinding) is of the same origin, but cannot help sending its
name as `Host`; an address or a name without a dot is not to be had by strangers.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import quote

from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api import access, problems
from service.api.complete import Complete, Layer
from service.api.keyring import Keyring
from service.api.ratelimit import RateLimit
from service.errors import (
    FoldserveError,
    Forbidden,
    HostNotAllowed,
    OriginNotAllowed,
    Unauthorized,
    UrlTooLong,
)
from service.settings import Settings
from service.store import KeyRecord
from service.store import Scope as KeyScope

COOKIE = "foldserve_key"
_CORS_REQUEST_HEADERS = (
    "accept",
    "authorization",
    "content-type",
    "inference-header-content-length",
    "last-event-id",
    "prefer",
    "x-api-key",
    "x-request-id",
)
_CORS_ANSWER_HEADERS = (
    "etag",
    "foldserve-code",
    "foldserve-version",
    "inference-header-content-length",
    "location",
    "preference-applied",
    "retry-after",
    "server-timing",
    "x-request-id",
)
_SAFE = ("GET", "HEAD", "OPTIONS")


@dataclass(frozen=True)
class Caller:
    """Who asks: the key, if one was needed and given, and whether the answer may hold data."""

    key: KeyRecord | None
    may_read: bool


ANYONE = Caller(None, may_read=True)
STRANGER = Caller(None, may_read=False)


def cors(settings: Settings) -> dict[str, Any]:
    """How starlette's CORS middleware opens the API to the pages of the named origins."""
    return {
        "allow_origins": settings.cors_origins,
        "allow_methods": ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"),
        "allow_headers": _CORS_REQUEST_HEADERS,
        "expose_headers": _CORS_ANSWER_HEADERS,
        "max_age": 600,
    }


class Guard:
    """ASGI middleware; see the module."""

    def __init__(
        self, app: ASGIApp, settings: Settings, keyring: Keyring, rate: RateLimit | None = None
    ) -> None:
        self._app = cast(Layer, app)
        self._keyring = keyring if settings.keys_required else None
        self._names = settings.allowed_hosts
        self._check_host = bool(self._names) or not settings.keys_required
        self._origins = frozenset(settings.cors_origins)
        self._max_url = settings.max_url_bytes
        self._rate = rate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its `Caller` in `state["caller"]`, or answer with its refusal."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refuse(scope, dict(scope["headers"]), known=False)
        await (self._app if refusal is None else refusal)(scope, receive, send)

    def answer(self, request: Complete) -> Awaitable[Response]:
        """See `complete.Layer`."""
        head = request.head
        refusal = self._refuse(request.scope, head.fields, known=head.checked_by is self)
        if refusal is not None:
            return _done(refusal)
        head.checked_by = self
        return self._app.answer(request)

    def _refuse(self, scope: Scope, head: dict[bytes, bytes], *, known: bool) -> Response | None:
        """Note who asks in the request's state; the refusal of who may not.

        A head that is `known` to be harmless is not looked at again, only who sends it.
        """
        try:
            if not known:
                self._check(scope, head)
            scope.setdefault("state", {})["caller"] = self._admit(scope, head)
        except FoldserveError as error:
            return _refusal(error, scope, head)
        return None

    def _check(self, scope: Scope, head: dict[bytes, bytes]) -> None:
        """Raises what a request with this head is refused with, whoever sends it and when."""
        length = len(scope["raw_path"]) + len(scope["query_string"])
        if length > self._max_url:
            raise UrlTooLong(f"Path and query have {length} bytes, of at most {self._max_url}.")
        host = head.get(b"host", b"").decode("latin-1")
        if self._check_host:
            check_host(host, self._names)
        if scope["method"] not in _SAFE:
            check_origin(host, head.get(b"origin"), head.get(b"sec-fetch-site"), self._origins)

    def _admit(self, scope: Scope, head: dict[bytes, bytes]) -> Caller:
        """The caller. Raises what the request is refused with."""
        path, method = scope["path"], scope["method"]
        wanted = access.needed(method, path)
        client = (scope.get("client") or ("",))[0]
        return admit(head, wanted, f"{method} {path}", client, self._keyring, self._rate)


async def _done(refusal: Response) -> Response:
    return refusal


def admit(
    head: Mapping[bytes, bytes],
    wanted: frozenset[KeyScope] | None,
    what: str,
    client: str,
    keyring: Keyring | None,
    rate: RateLimit | None,
) -> Caller:
    """Who sends a request with this head, if its key allows `what`, which wants those scopes.

    `client` is the address by which a caller without a key is counted; without a keyring no key
    is needed. Raises Unauthorized, Forbidden or RateLimited.
    """
    caller = ANYONE if keyring is None else _identified(head, wanted, what, keyring)
    if rate is not None and wanted is not None:
        rate.take(caller.key.id if caller.key else client)
    return caller


def _identified(
    head: Mapping[bytes, bytes],
    wanted: frozenset[KeyScope] | None,
    what: str,
    keyring: Keyring,
) -> Caller:
    presented = _presented(head)
    if presented is None:
        if wanted is None:
            return STRANGER
        raise Unauthorized("The request carries no API key.")
    try:
        key = keyring.identify(presented)
    except Unauthorized:
        if wanted is None:
            return STRANGER
        raise
    if wanted is not None and not wanted & key.scopes:
        missing = sorted(wanted)
        raise Forbidden(
            f"{what} needs the scope {' or '.join(missing)}; key {key.id} has "
            f"{', '.join(sorted(key.scopes))}.",
            required=missing,
        )
    return Caller(key, may_read=KeyScope.READ in key.scopes)


def check_host(host: str, names: tuple[str, ...]) -> None:
    """Raises HostNotAllowed for a `Host` by which a rebound name could have come.

    Addresses and names without a dot pass (nobody can point them elsewhere), and what `names` list:
    names, `*.name` for those below it, `*` for any.
    """
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    name = name.lower().rstrip(".")
    if "." not in name and ":" not in name:
        return
    for allowed in names:
        if allowed in ("*", name) or (allowed.startswith("*.") and name.endswith(allowed[1:])):
            return
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        raise HostNotAllowed(f"The request is for the host {host[:80]!r}.") from None


def check_origin(
    host: str, origin: bytes | None, site: bytes | None, allowed: frozenset[str]
) -> None:
    """Raises OriginNotAllowed when a browser says that another site's page asks.

    `origin` and `site` are the headers `Origin` and `Sec-Fetch-Site`; programs send neither.
    """
    if site in (b"same-origin", b"none"):
        return
    if origin is None:
        if site is not None:
            raise OriginNotAllowed("The request comes from a page of another site.")
        return
    text = origin.decode("latin-1")
    if text in allowed or (site is None and text.partition("://")[2] == host.lower()):
        return
    raise OriginNotAllowed(f"The request comes from a page of {text[:80]!r}.")


def _presented(head: Mapping[bytes, bytes]) -> str | None:
    """The key in a request's head: `Authorization`, `X-API-Key`, or the pages' cookie."""
    if (given := head.get(b"authorization")) is not None:
        kind, _, key = given.decode("latin-1").partition(" ")
        return key.strip() if kind.lower() == "bearer" else ""
    if (given := head.get(b"x-api-key")) is not None:
        return given.decode("latin-1").strip()
    if (given := head.get(b"cookie")) is not None:
        return cookie_key(given.decode("latin-1"))
    return None


def cookie_key(header: str) -> str | None:
    """The key in a `Cookie` header."""
    for pair in header.split(";"):
        name, _, value = pair.strip().partition("=")
        if name == COOKIE:
            return value
    return None


def _refusal(error: FoldserveError, scope: Scope, head: dict[bytes, bytes]) -> Response:
    """The answer in the form of the route's protocol; a person's browser is sent to the login."""
    path: str = scope["path"]
    if (
        isinstance(error, Unauthorized)
        and scope["method"] in ("GET", "HEAD")
        and b"text/html" in head.get(b"accept", b"")
        and not path.startswith(("/v1/", "/v2/"))
    ):
        return RedirectResponse(f"/login?next={quote(path)}", 303)
    return problems.error_response(error, path)
