"""A browser page under watch: whatever it must never do is written down and checked at the end."""

from __future__ import annotations

from dataclasses import dataclass, field

from playwright.sync_api import ConsoleMessage, Page, Request

XSS = "<img src=x onerror=window.pwned=1>"  # what would run if text became markup
_NETWORK = "Failed to load resource"  # the browser's own line for a status of 400 or above


@dataclass
class Watched:
    """`page` of the service at `url`. `refusals` are the statuses that a test provokes, and
    `unanswered` says that it lets requests go without an answer."""

    page: Page
    url: str
    refusals: set[int] = field(default_factory=set)
    unanswered: bool = False
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("request", self._requested)
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.complaints.append(f"thrown: {error}"))
        self.page.on("dialog", lambda dialog: self.complaints.append(f"dialog: {dialog.message}"))

    def _requested(self, request: Request) -> None:
        self.requests.append(request.url)

    def _said(self, message: ConsoleMessage) -> None:
        provoked = [f"status of {status} " for status in self.refusals]
        if self.unanswered:
            provoked += ["net::ERR_FAILED", "net::ERR_CONNECTION_REFUSED"]
        expected = message.text.startswith(_NETWORK) and any(
            each in message.text for each in provoked
        )
        if message.type in ("error", "warning") and not expected:
            self.complaints.append(f"{message.type}: {message.text}")

    def outside(self) -> list[str]:
        """Requests that left the service; `data:` and `blob:` addresses stay in the browser."""
        inside = (f"{self.url}/", "data:", f"blob:{self.url}/")
        return [url for url in self.requests if not url.startswith(inside)]

    def go(self, path: str) -> None:
        """Open a page and wait until its first data are shown."""
        self.page.goto(path)
        self.page.wait_for_selector("[aria-busy]", state="detached")

    def check(self) -> None:
        """No request went elsewhere, and nothing was thrown, blocked or complained about."""
        assert self.outside() == []
        assert self.complaints == []
