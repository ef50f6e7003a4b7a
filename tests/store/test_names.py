"""Names from outside."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import NameInvalid
from service.store.names import check_model_name, clean_filename


@given(st.text(max_size=70))
def test_a_model_name_is_exactly_what_the_pattern_says(name: str) -> None:
    if re.match(r"^[a-z0-9][a-z0-9._-]{0,62}\Z", name, re.ASCII):
        assert check_model_name(name) == name
    else:
        with pytest.raises(NameInvalid):
            check_model_name(name)


@given(st.text(max_size=400))
def test_no_file_name_can_lead_anywhere_or_hide_anything(name: str) -> None:
    clean = clean_filename(name)
    if clean is not None:
        assert 0 < len(clean) <= 255
        assert not set(clean) & set("/\\")
        assert clean not in (".", "..")
        assert not any(unicodedata.category(c).startswith("C") for c in clean)


@pytest.mark.parametrize(
    ("given_name", "clean"),
    [
        ("RepVGG-A0-train.pth", "RepVGG-A0-train.pth"),
        ("C:\\Users\\me\\net.pth", "net.pth"),
        ("../../etc/passwd", "passwd"),
        ("a\0b.pth", "ab.pth"),
        ("\u202egnp.pth", "gnp.pth"),
        ("..", None),
        ("a/", None),
        ("", None),
        (None, None),
        ("x" * 300 + ".pth", "x" * 251 + ".pth"),
    ],
)
def test_file_names_are_cleaned(given_name: str | None, clean: str | None) -> None:
    assert clean_filename(given_name) == clean
