"""API keys: made here, shown once, and kept as a hash.

A key is `fsk_<id>_<secret>` with 256 random bits of secret. Its SHA-256 is stored: a slow hash such
as scrypt protects passwords that people think up, whereas nobody enumerates 2**256 secrets, and it
would cost every request what the model costs. The id is no secret; it names the key in lists, logs
and metrics.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Self

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.errors import KeyNotFound
from service.store.schema import ApiKeyRow, utc_now

_FORM = re.compile(r"fsk_([a-z2-7]{10})_[A-Za-z0-9_-]{43}")
_NAME_LENGTH = 100

Sessions = Callable[[], AbstractContextManager[Session]]


class Scope(StrEnum):
    """What a key may do. None implies another."""

    READ = "read"
    PREDICT = "predict"
    WRITE = "write"


@dataclass(frozen=True)
class KeyRecord:
    """One API key as stored: everything but the key."""

    id: str
    name: str
    digest: str = field(repr=False)
    scopes: frozenset[Scope]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None

    @classmethod
    def of(cls, row: ApiKeyRow) -> Self:
        """The row's values at this moment, its scopes as a set."""
        scopes = frozenset(Scope(scope) for scope in row.scopes.split())
        return cls(
            row.id, row.name, row.digest, scopes, row.created_at, row.expires_at, row.revoked_at
        )

    def usable(self, now: datetime) -> bool:
        """Whether the key opens anything at the moment `now` (aware)."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)

    def matches(self, key: str) -> bool:
        """Whether `key` is this one, in time that does not depend on where they differ."""
        return hmac.compare_digest(digest_of(key), self.digest)


def key_id(text: str) -> str | None:
    """The id inside a presented key; None for a text that no key can have."""
    found = _FORM.fullmatch(text)
    return None if found is None else found[1]


def digest_of(key: str) -> str:
    """What is stored of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


class KeyTable:
    """The keys of one catalog, one transaction a method."""

    def __init__(self, reads: Sessions, writes: Sessions) -> None:
        self._reads, self._writes = reads, writes

    def create(
        self, name: str, scopes: Iterable[Scope], expires_at: datetime | None = None
    ) -> tuple[str, KeyRecord]:
        """A new key and its record; the key itself is not to be had again."""
        granted = frozenset(scopes)
        if not granted or not 1 <= len(name) <= _NAME_LENGTH or not name.isprintable():
            raise ValueError(f"a key needs a scope and a name of 1 to {_NAME_LENGTH} characters")
        identity = base64.b32encode(secrets.token_bytes(7)).decode().lower()[:10]
        key = f"fsk_{identity}_{secrets.token_urlsafe(32)}"
        with self._writes() as session:
            row = ApiKeyRow(
                id=identity,
                name=name,
                digest=digest_of(key),
                scopes=" ".join(sorted(granted)),
                expires_at=expires_at,
                created_at=utc_now(),
            )
            session.add(row)
            session.flush()
            return key, KeyRecord.of(row)

    def all(self) -> tuple[KeyRecord, ...]:
        """Every key that was ever made, the oldest first."""
        with self._reads() as session:
            rows = session.scalars(select(ApiKeyRow).order_by(ApiKeyRow.created_at, ApiKeyRow.id))
            return tuple(KeyRecord.of(row) for row in rows)

    def usable(self) -> tuple[KeyRecord, ...]:
        """The keys that open something now."""
        now = utc_now()
        return tuple(record for record in self.all() if record.usable(now))

    def revoke(self, identity: str) -> KeyRecord:
        """End a key for good; twice is once. Raises KeyNotFound."""
        with self._writes() as session:
            row = session.get(ApiKeyRow, identity, with_for_update=True)
            if row is None:
                raise KeyNotFound(f"There is no key {identity[:40]!r}.")
            row.revoked_at = row.revoked_at or utc_now()
            return KeyRecord.of(row)
