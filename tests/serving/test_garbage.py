"""What was imported is not looked through for garbage again and again."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Iterator

import pytest

from service.serving import ModelSet, garbage, models
from tests.serving import pair


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.setattr(garbage, "_imported", 0)
    yield monkeypatch
    gc.unfreeze()


def test_what_is_there_is_set_aside_once(untouched: pytest.MonkeyPatch) -> None:
    kept = [[] for _ in range(1000)]  # type: ignore[var-annotated]
    before = gc.get_freeze_count()
    assert garbage.settle()
    assert gc.get_freeze_count() > before + len(kept)
    assert not garbage.settle()


def test_what_comes_with_many_modules_is_set_aside_too(untouched: pytest.MonkeyPatch) -> None:
    assert garbage.settle()
    more = {f"module_{number}": sys for number in range(garbage.NEW_MODULES)}
    untouched.setattr(sys, "modules", {**sys.modules, **more})
    assert garbage.settle()


def test_a_load_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(models, "settle", lambda: calls.append("settled"))

    async def scenario() -> None:
        loaded = ModelSet()
        await loaded.load("net", 1, {"deploy": pair.program})
        await loaded.close()

    asyncio.run(scenario())
    assert calls == ["settled"]
