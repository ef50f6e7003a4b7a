"""What docs/security.md says is what the code does."""

from __future__ import annotations

import re

from service.api.problems import catalogue
from service.checkpoint.sandbox import FEATURES
from service.client import API_KEY_VARIABLE
from service.settings import PREFIX, Settings
from tests.checkpoint.tricks import CONFIG_TRICKS, TRICKS
from tests.running import ROOT

PAGE = (ROOT / "docs" / "security.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its head."""
    part = PAGE.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_tricks_are_those_of_the_tests() -> None:
    known = [[trick.what, f"`{trick.code}`"] for trick in TRICKS]
    known += [[what, f"`{code}`"] for what, code in CONFIG_TRICKS]
    assert rows("Known tricks and their codes") == known


def test_the_codes_are_those_of_the_service() -> None:
    codes = {row["code"] for row in catalogue()}
    assert {code.strip("`") for _, code in rows("Known tricks and their codes")} <= codes


def test_the_measures_are_those_of_the_sandbox() -> None:
    assert [name.strip("`") for name, _ in rows("The child process")] == list(FEATURES)


def test_settings_that_it_names_exist() -> None:
    table = (ROOT / "docs" / "configuration.md").read_text()
    for name in set(re.findall(r"`(FOLDSERVE_[A-Z_]+)`", PAGE)) - {API_KEY_VARIABLE}:
        assert f"`{name}`" in table, name


def limits() -> list[list[str]]:
    """The rows of the table of what a client may take."""
    part = PAGE.split("### How much at once\n", 1)[1].split("\n### ", 1)[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_limit_is_a_setting_and_refuses_as_it_says() -> None:
    known = {(str(row["status"]), row["code"]) for row in catalogue()}
    settings = {row.variable for row in Settings.table()}
    for what, names, answer in limits():
        assert {PREFIX + name for name in re.findall(r"`([A-Z_]+)`", names)} <= settings, what
        if found := re.match(r"(\d+) `(\w+)`", answer):
            assert (found[1], found[2]) in known, what
    assert len(limits()) > 8
