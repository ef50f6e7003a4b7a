"""The catalog: numbering, defaults, paging, deletion, benchmarks."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import StatementError

from service.errors import (
    BadInput,
    Conflict,
    ModelNotFound,
    NameInvalid,
    VersionNotFound,
)
from service.store import Catalog, State

from .helpers import OTHER, SHA, create, in_threads, make_ready, publish


def test_a_new_version_holds_what_was_uploaded(catalog: Catalog) -> None:
    made = catalog.create_version("digits", SHA, 7, "../a/net.pth", {"labels": ["zero"]})
    assert (made.model, made.version, made.state) == ("digits", 1, State.QUEUED)
    checkpoint = made.checkpoint
    assert (checkpoint.sha256, checkpoint.bytes, checkpoint.filename) == (SHA, 7, "net.pth")
    assert checkpoint.form is None
    assert made.config == {"labels": ["zero"]}
    assert made.created_at.tzinfo is not None
    assert catalog.get_version("digits", 1) == made


@pytest.mark.parametrize(
    "name", ["", "A", "-a", ".a", "a/b", "a\\b", "a\0", "a\n", "ä", "a b", "x" * 64, "a\u202e"]
)
def test_bad_names_are_refused_everywhere(catalog: Catalog, name: str) -> None:
    for call in (
        lambda: create(catalog, name),
        lambda: catalog.get_model(name),
        lambda: catalog.list_versions(name),
        lambda: catalog.delete_model(name),
    ):
        with pytest.raises(NameInvalid):
            call()
    assert catalog.list_models().items == ()


def test_the_longest_name_is_taken(catalog: Catalog) -> None:
    assert create(catalog, "a" * 63).version == 1


def test_concurrent_creators_get_distinct_numbers(catalog: Catalog) -> None:
    in_threads(8, lambda _: [create(catalog) for _ in range(5)])
    versions = catalog.list_versions("digits", limit=1000).items
    assert [v.version for v in versions] == list(range(40, 0, -1))


def test_a_number_never_comes_back(catalog: Catalog) -> None:
    create(catalog)
    create(catalog)
    catalog.delete_version("digits", 2)
    assert create(catalog).version == 3
    catalog.delete_model("digits")
    with pytest.raises(ModelNotFound):
        catalog.get_model("digits")
    assert create(catalog).version == 4
    assert [v.version for v in catalog.list_versions("digits").items] == [4]


def test_the_default_follows_the_newest_ready_version(catalog: Catalog) -> None:
    create(catalog)
    assert catalog.get_model("digits").default_version is None
    assert make_ready(catalog) == 2
    assert catalog.get_model("digits").default_version == 2


def test_an_older_version_that_ends_later_does_not_take_the_default(catalog: Catalog) -> None:
    for _ in range(2):
        create(catalog)
        catalog.claim_next("w")
    publish(catalog, "digits", 2)
    publish(catalog, "digits", 1)
    assert catalog.get_model("digits").default_version == 2


def test_a_pinned_default_stays_until_it_is_unpinned(catalog: Catalog) -> None:
    make_ready(catalog)
    make_ready(catalog)
    pinned = catalog.set_default("digits", 1)
    assert (pinned.default_version, pinned.pinned) == (1, True)
    make_ready(catalog)
    assert catalog.get_model("digits").default_version == 1
    assert catalog.set_default("digits", None).default_version == 3
    make_ready(catalog)
    assert catalog.get_model("digits").default_version == 4


def test_only_a_ready_version_can_be_the_default(catalog: Catalog) -> None:
    create(catalog)
    with pytest.raises(Conflict, match="queued"):
        catalog.set_default("digits", 1)
    with pytest.raises(VersionNotFound):
        catalog.set_default("digits", 9)
    with pytest.raises(ModelNotFound):
        catalog.set_default("other", 1)


def test_deleting_the_default_falls_back_to_the_newest_ready(catalog: Catalog) -> None:
    for _ in range(3):
        make_ready(catalog)
    create(catalog)
    catalog.set_default("digits", 3)
    catalog.delete_version("digits", 3)
    model = catalog.get_model("digits")
    assert (model.default_version, model.pinned) == (2, False)
    catalog.delete_version("digits", 1)
    assert catalog.get_model("digits").default_version == 2
    catalog.delete_version("digits", 2)
    assert catalog.get_model("digits").default_version is None


def test_deletion_takes_everything_that_hangs_on_a_version(catalog: Catalog) -> None:
    version = make_ready(catalog)
    catalog.save_benchmark("digits", version, {"ratio": 2.0})
    assert catalog.references().keys() == {SHA, OTHER}
    catalog.delete_version("digits", version)
    assert catalog.references() == {}
    assert catalog.get_benchmark("digits") is None
    for call in (catalog.get_version, catalog.events, catalog.delete_version):
        with pytest.raises(VersionNotFound):
            call("digits", version)
    assert catalog.get_model("digits").default_version is None


@pytest.mark.parametrize("version", [0, -1, 2, 2**31, 2**70])
def test_absurd_version_numbers_are_just_absent(catalog: Catalog, version: int) -> None:
    create(catalog)
    with pytest.raises(VersionNotFound):
        catalog.get_version("digits", version)


def test_models_are_paged_by_name(catalog: Catalog) -> None:
    names = sorted(f"m{i}" for i in range(7))
    for name in reversed(names):
        create(catalog, name)
    seen, cursor = list[str](), None
    while True:
        page = catalog.list_models(cursor, limit=3)
        seen += [model.name for model in page.items]
        if (cursor := page.next_cursor) is None:
            break
    assert seen == names


def test_versions_are_paged_newest_first_by_model_and_over_all(catalog: Catalog) -> None:
    for name in ("a", "b", "a", "a", "b"):
        create(catalog, name)
    for model, expected in (
        ("a", [("a", 3), ("a", 2), ("a", 1)]),
        (None, [("b", 2), ("a", 3), ("a", 2), ("b", 1), ("a", 1)]),
    ):
        seen, cursor = list[tuple[str, int]](), None
        while True:
            page = catalog.list_versions(model, cursor, limit=2)
            seen += [(v.model, v.version) for v in page.items]
            if (cursor := page.next_cursor) is None:
                break
        assert seen == expected
    assert catalog.list_versions(state=State.READY).items == ()


@pytest.mark.parametrize("cursor", ["x", "-1", "1e3", "9" * 30, ""])
def test_a_made_up_cursor_is_refused(catalog: Catalog, cursor: str) -> None:
    create(catalog)
    with pytest.raises(BadInput):
        catalog.list_versions("digits", cursor)


def test_the_last_benchmark_counts(catalog: Catalog) -> None:
    first, second = make_ready(catalog), make_ready(catalog)
    assert catalog.get_benchmark("digits") is None
    catalog.save_benchmark("digits", second, {"ratio": 1.0})
    catalog.save_benchmark("digits", first, {"ratio": 2.0})
    latest = catalog.get_benchmark("digits")
    assert latest is not None
    assert (latest.version, latest.result) == (first, {"ratio": 2.0})
    of_second = catalog.get_benchmark("digits", second)
    assert of_second is not None
    assert of_second.result == {"ratio": 1.0}
    with pytest.raises(VersionNotFound):
        catalog.save_benchmark("digits", 9, {})


def test_json_that_no_client_could_read_is_not_stored(catalog: Catalog) -> None:
    version = make_ready(catalog)
    with pytest.raises((StatementError, ValueError), match="not JSON compliant"):
        catalog.save_benchmark("digits", version, {"ratio": float("nan")})
    assert catalog.get_benchmark("digits") is None


def test_a_second_opening_finds_everything(database_url: str) -> None:
    first = Catalog(database_url)
    make_ready(first)
    before = first.get_version("digits", 1), first.get_model("digits"), first.events("digits", 1)
    first.close()
    second = Catalog(database_url)
    after = second.get_version("digits", 1), second.get_model("digits"), second.events("digits", 1)
    second.close()
    assert before == after


def test_records_do_not_change_under_the_reader(catalog: Catalog) -> None:
    made = create(catalog)
    catalog.claim_next("w")
    assert made.state is State.QUEUED
    with pytest.raises(AttributeError):
        made.state = State.READY  # type: ignore[misc]
