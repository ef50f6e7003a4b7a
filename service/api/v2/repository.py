"""The model repository: what versions there are and why one does not serve; load and unload."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from service.api.state import Service, in_thread
from service.errors import BadInput
from service.store import State, VersionRecord

_PAGE = 500


async def index(service: Service, *, ready_only: bool) -> list[dict[str, str]]:
    """Every version of every model with its state and, where it is not READY, the reason.

    READY: loaded, and answers at once. LOADING: queued, being converted or being loaded.
    UNAVAILABLE: rejected, not servable, failed to load, unloaded, or simply not in memory.
    """
    records = await in_thread(_all_versions, service)
    entries = [_entry(service, record) for record in records]
    return [entry for entry in entries if not ready_only or entry["state"] == "READY"]


def _all_versions(service: Service) -> list[VersionRecord]:
    records: list[VersionRecord] = []
    cursor: str | None = None
    while True:
        page = service.catalog.list_versions(None, cursor, _PAGE)
        records += page.items
        cursor = page.next_cursor
        if cursor is None:
            return sorted(records, key=lambda each: (each.model, each.version))


def _entry(service: Service, record: VersionRecord) -> dict[str, str]:
    state, reason = _state(service, record)
    return {
        "name": record.model,
        "version": str(record.version),
        "state": state,
        "reason": reason,
    }


def _state(service: Service, record: VersionRecord) -> tuple[str, str]:
    host, key = service.host, (record.model, record.version)
    if host.hosted(*key) is not None:
        return "READY", ""
    if not record.state.final:
        return "LOADING", record.state.value
    if record.state == State.REJECTED:
        return "UNAVAILABLE", str((record.error or {}).get("detail", "rejected"))
    if not record.servable:
        return "UNAVAILABLE", "It can be downloaded, but has no program to run."
    if host.is_unloaded(record.model):
        return "UNAVAILABLE", "unloaded"
    if host.is_loading(*key):
        return "LOADING", "loading"
    failure = host.failures.get(key)
    if failure is not None:
        return "UNAVAILABLE", failure.detail
    return "UNAVAILABLE", "It is no default; a request for its number loads it."


async def load(service: Service, name: str, parameters: Mapping[str, Any]) -> None:
    """Serve a model's default again, loaded and warm when this returns.

    Raises BadInput for parameters, which would replace the stored configuration or files; and
    what loading raises.
    """
    if parameters:
        raise BadInput(
            f"The parameter {next(iter(parameters))[:40]!r} is not taken by load.",
            remedy="Upload a new version with POST /v1/models/{name}/versions instead.",
        )
    await service.host.load(name)


async def unload(service: Service, name: str) -> None:
    """Take every version of a model out of serving until it is loaded or the service restarts.

    Requests that wait are answered first. Raises ModelNotFound.
    """
    await in_thread(service.catalog.get_model, name)
    await service.host.unload(name)
