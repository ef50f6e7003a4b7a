"""The state machine of a version: claiming, progress, publishing, rejecting, recovery."""

from __future__ import annotations

import threading

import pytest

from service.errors import Conflict, ConversionInterrupted, NotACheckpoint, VersionNotFound
from service.store import Catalog, State, VersionRecord

from .helpers import OTHER, create, in_threads, publish


def claim(catalog: Catalog, worker: str = "w") -> VersionRecord:
    claimed = catalog.claim_next(worker)
    assert claimed is not None
    return claimed


def test_claims_go_by_age_and_are_counted(catalog: Catalog) -> None:
    create(catalog, "b")
    create(catalog, "a")
    first, second = claim(catalog), claim(catalog)
    assert (first.model, second.model) == ("b", "a")
    assert (first.state, first.attempts, first.worker) == (State.CONVERTING, 1, "w")
    assert catalog.claim_next("w") is None


def test_no_version_is_claimed_twice(catalog: Catalog) -> None:
    for _ in range(24):
        create(catalog)
    taken, lock = list[int](), threading.Lock()

    def work(index: int) -> None:
        while claimed := catalog.claim_next(f"w{index}"):
            with lock:
                taken.append(claimed.version)

    in_threads(6, work)
    assert sorted(taken) == list(range(1, 25))


def test_publish_keeps_what_conversion_found(catalog: Catalog) -> None:
    create(catalog)
    claim(catalog)
    record = catalog.publish(
        "digits",
        1,
        form="deploy",
        architecture={"family": "repvgg"},
        fusion={"blocks": 22},
        artifacts={"deploy": OTHER, "report": "ef" * 32},
        worker="w",
    )
    assert record == catalog.get_version("digits", 1)
    assert (record.state, record.checkpoint.form) == (State.READY, "deploy")
    assert record.architecture == {"family": "repvgg"}
    assert record.artifacts == {"deploy": OTHER, "report": "ef" * 32}


def test_reject_keeps_the_bytes_and_the_reason(catalog: Catalog) -> None:
    made = create(catalog)
    claim(catalog)
    error = NotACheckpoint("It is a text file.").to_dict()
    record = catalog.reject("digits", 1, error, worker="w")
    assert (record.state, record.error) == (State.REJECTED, error)
    assert record.checkpoint == made.checkpoint
    assert catalog.get_model("digits").default_version is None


@pytest.mark.parametrize("state", [State.QUEUED, State.READY, State.REJECTED])
def test_only_a_converting_version_moves_on(catalog: Catalog, state: State) -> None:
    create(catalog)
    if state is not State.QUEUED:
        claim(catalog)
    if state is State.READY:
        publish(catalog, "digits", 1)
    if state is State.REJECTED:
        catalog.reject("digits", 1, {})
    for call in (
        lambda: publish(catalog, "digits", 1),
        lambda: catalog.reject("digits", 1, {}),
        lambda: catalog.set_progress("digits", 1, {}),
    ):
        with pytest.raises(Conflict, match=state.value):
            call()
    assert catalog.get_version("digits", 1).state is state


def test_a_worker_learns_that_it_lost_its_version(catalog: Catalog) -> None:
    create(catalog)
    claim(catalog, "old")
    catalog.recover_interrupted()
    claim(catalog, "new")
    with pytest.raises(Conflict, match="another worker"):
        catalog.set_progress("digits", 1, {}, worker="old")
    catalog.set_progress("digits", 1, {"stage": "fuse"}, worker="new")
    catalog.delete_version("digits", 1)
    with pytest.raises(VersionNotFound):
        publish(catalog, "digits", 1)


def test_events_are_numbered_and_replayed_from_any_point(catalog: Catalog) -> None:
    create(catalog)
    claim(catalog)
    for done in range(3):
        catalog.set_progress("digits", 1, {"done": done})
    publish(catalog, "digits", 1)
    events = catalog.events("digits", 1)
    assert [event.number for event in events] == [1, 2, 3, 4, 5, 6]
    assert [event.data.get("state") for event in events if event.kind == "state"] == [
        "queued",
        "converting",
        "ready",
    ]
    assert catalog.events("digits", 1, after=4) == events[4:]
    assert catalog.events("digits", 1, after=1, limit=2) == events[1:3]
    assert catalog.events("digits", 1, after=2**80) == ()
    assert catalog.get_version("digits", 1).progress == {"done": 2}


def test_concurrent_events_leave_no_gap(catalog: Catalog) -> None:
    create(catalog)
    claim(catalog)

    def work(index: int) -> None:
        for _ in range(5):
            catalog.set_progress("digits", 1, {"by": index})

    in_threads(4, work)
    assert [event.number for event in catalog.events("digits", 1)] == list(range(1, 23))


def test_interrupted_conversions_are_tried_twice_then_rejected(catalog: Catalog) -> None:
    create(catalog)
    claim(catalog)
    catalog.set_progress("digits", 1, {"stage": "fuse"})
    (again,) = catalog.recover_interrupted()
    assert (again.state, again.attempts, again.worker, again.progress) == (
        State.QUEUED,
        1,
        None,
        None,
    )
    assert claim(catalog).attempts == 2
    (given_up,) = catalog.recover_interrupted()
    assert given_up.state is State.REJECTED
    assert given_up.error is not None
    assert given_up.error["code"] == ConversionInterrupted.code()
    assert catalog.recover_interrupted() == ()


def test_recovery_leaves_the_rest_alone(catalog: Catalog) -> None:
    create(catalog)
    claim(catalog)
    publish(catalog, "digits", 1)
    create(catalog)
    assert catalog.recover_interrupted() == ()
    claim(catalog)
    assert catalog.recover_interrupted(stale_seconds=60) == ()
    assert catalog.count_states() == {
        State.QUEUED: 0,
        State.CONVERTING: 1,
        State.READY: 1,
        State.REJECTED: 0,
    }


def test_publishing_and_deleting_at_once_never_deadlock(catalog: Catalog) -> None:
    for _ in range(12):
        create(catalog)
        claim(catalog)

    def work(index: int) -> None:
        for version in range(1, 13):
            try:
                if index % 2:
                    publish(catalog, "digits", version)
                else:
                    catalog.delete_version("digits", version)
            except (Conflict, VersionNotFound):
                continue

    in_threads(4, work)
    assert catalog.list_versions("digits").items == ()
    assert catalog.get_model("digits").default_version is None


def test_only_the_dead_and_the_silent_lose_their_conversions(catalog: Catalog) -> None:
    create(catalog)
    create(catalog)
    claim(catalog, "living")
    claim(catalog, "dead")
    (taken,) = catalog.recover_interrupted(stale_seconds=60, dead=["dead"])
    assert taken.version == 2
    catalog.show_life("digits", 1, worker="living")
    with pytest.raises(Conflict):
        catalog.show_life("digits", 2, worker="dead")
    assert len(catalog.recover_interrupted(stale_seconds=0)) == 1


def test_a_released_version_keeps_its_attempts(catalog: Catalog) -> None:
    create(catalog)
    for _ in range(5):
        claim(catalog)
        catalog.release("digits", 1, worker="w")
        assert catalog.get_version("digits", 1).attempts == 0
    with pytest.raises(Conflict):
        catalog.release("digits", 1, worker="w")
