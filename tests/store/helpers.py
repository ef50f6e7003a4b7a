"""Short ways to bring a catalog into a state."""

from __future__ import annotations

import threading
from collections.abc import Callable

from service.store import Catalog, VersionRecord

SHA = "ab" * 32
OTHER = "cd" * 32


def create(catalog: Catalog, model: str = "digits", **kwargs: object) -> VersionRecord:
    return catalog.create_version(model, SHA, 7, "net.pth", dict(kwargs))


def make_ready(catalog: Catalog, model: str = "digits") -> int:
    """A new version of `model`, claimed (with anything queued before it) and published."""
    version = create(catalog, model).version
    while claimed := catalog.claim_next("w"):
        publish(catalog, claimed.model, claimed.version)
    return version


def publish(catalog: Catalog, model: str, version: int) -> VersionRecord:
    return catalog.publish(
        model, version, form="train", architecture={}, fusion={}, artifacts={"deploy": OTHER}
    )


def in_threads(count: int, work: Callable[[int], object]) -> None:
    """Run `work(0..count-1)` at the same time; the first exception is raised here."""
    barrier, failures = threading.Barrier(count), list[BaseException]()

    def run(index: int) -> None:
        barrier.wait()
        try:
            work(index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
