"""API keys in the catalog: what is stored, what opens, what ends."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from service.errors import KeyNotFound
from service.store import Catalog, Scope, key_id


def test_a_key_is_stored_as_its_hash_alone(catalog: Catalog, database_url: str) -> None:
    key, record = catalog.keys.create("ci", [Scope.PREDICT, Scope.READ])
    assert re.fullmatch(r"fsk_[a-z2-7]{10}_[A-Za-z0-9_-]{43}", key)
    assert key_id(key) == record.id
    (stored,) = catalog.keys.all()
    assert stored == record
    assert stored.scopes == {Scope.READ, Scope.PREDICT}
    assert stored.matches(key)
    assert not stored.matches(key[:-1])
    assert key.split("_", 2)[2] not in repr(stored)
    if database_url.startswith("sqlite:///"):
        folder = Path(database_url.removeprefix("sqlite:///")).parent
        kept = b"".join(file.read_bytes() for file in folder.iterdir())
        assert stored.digest.encode() in kept  # the control
        assert key.encode() not in kept
        assert key.split("_", 2)[2].encode() not in kept


def test_keys_differ(catalog: Catalog) -> None:
    made = [catalog.keys.create("n", [Scope.READ]) for _ in range(20)]
    assert len({key for key, _ in made}) == len({record.id for _, record in made}) == 20


def test_a_revoked_or_expired_key_opens_nothing(catalog: Catalog) -> None:
    now = datetime.now(UTC)
    _, lasting = catalog.keys.create("a", [Scope.READ])
    _, brief = catalog.keys.create("b", [Scope.READ], now + timedelta(hours=1))
    assert brief.usable(now)
    assert not brief.usable(now + timedelta(hours=2))
    assert lasting.usable(now + timedelta(days=9999))
    revoked = catalog.keys.revoke(lasting.id)
    assert not revoked.usable(now + timedelta(seconds=5))
    assert catalog.keys.revoke(lasting.id).revoked_at == revoked.revoked_at
    assert [record.id for record in catalog.keys.usable()] == [brief.id]
    with pytest.raises(KeyNotFound):
        catalog.keys.revoke("nothing")


@pytest.mark.parametrize("name", ["", "x" * 101, "a\nb", "a\x1b[31m"])
def test_a_key_needs_a_name_and_a_scope(catalog: Catalog, name: str) -> None:
    with pytest.raises(ValueError, match="needs a scope and a name"):
        catalog.keys.create(name, [Scope.READ])
    with pytest.raises(ValueError, match="needs a scope and a name"):
        catalog.keys.create("good", [])


@pytest.mark.parametrize(
    "text", ["", "fsk_", "fsk_short_" + "a" * 43, "fsk_" + "a" * 10 + "_" + "a" * 42 + "\n"]
)
def test_what_cannot_be_a_key_has_no_id(text: str) -> None:
    assert key_id(text) is None
