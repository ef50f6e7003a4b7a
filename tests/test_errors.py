from __future__ import annotations

import json
import pickle
import re

import pytest

from service import errors
from service.errors import FoldserveError, all_kinds

KINDS = list(all_kinds())


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_json(kind: type[FoldserveError]) -> None:
    error = kind("what happened", keys=["a.weight"], limit=3)
    back = FoldserveError.from_dict(json.loads(json.dumps(error.to_dict())))
    assert type(back) is kind
    assert back.to_dict() == error.to_dict()
    assert str(back) == "what happened"


def test_an_error_survives_pickle_with_its_own_remedy() -> None:
    error = errors.QueueFull("full", remedy="wait", retry_after=2)
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is errors.QueueFull
    assert (back.remedy, back.extra) == ("wait", {"retry_after": 2})


def test_an_unknown_code_becomes_the_base_class() -> None:
    back = FoldserveError.from_dict({"code": "from_the_future", "detail": "?"})
    assert type(back) is FoldserveError


def test_codes_are_unique_snake_case() -> None:
    codes = [kind.code() for kind in KINDS]
    assert len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", code) for code in codes)


def test_the_drawn_tree_is_the_tree() -> None:
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__ or "")
    assert sorted(drawn) == sorted(kind.__name__ for kind in KINDS if kind is not FoldserveError)


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_says_what_to_do(kind: type[FoldserveError]) -> None:
    assert kind.remedy.endswith((".", "!"))
    assert kind.title
    assert not kind.title.endswith(".")
