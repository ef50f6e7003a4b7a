"""`foldserve keys`, and a start that is refused without one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from service.api.server import _has_key
from service.cli import app
from service.settings import Settings
from tests.running import running


def run(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments, "--data-dir", str(folder)])


def test_made_listed_and_revoked(tmp_path: Path) -> None:
    made = run(tmp_path, "create", "--name", "ci", "--scope", "read", "--scope", "write", "--json")
    assert made.exit_code == 0, made.output
    record = json.loads(made.stdout)
    assert record["scopes"] == ["read", "write"]
    listed = run(tmp_path, "list", "--json")
    assert record["key"] not in listed.stdout
    assert [row["id"] for row in json.loads(listed.stdout)] == [record["id"]]
    assert "usable" in run(tmp_path, "list").stdout
    assert run(tmp_path, "revoke", record["id"]).exit_code == 0
    assert json.loads(run(tmp_path, "list", "--json").stdout)[0]["state"] == "revoked"
    wrong = run(tmp_path, "revoke", "nothing")
    assert wrong.exit_code == 1
    assert "key_not_found" in wrong.stderr


def test_a_key_is_all_that_stdout_holds_and_may_end(tmp_path: Path) -> None:
    made = run(tmp_path, "create", "--name", "brief", "--scope", "predict", "--days", "0")
    assert made.stdout.strip().startswith("fsk_")
    assert len(made.stdout.split()) == 1
    assert json.loads(run(tmp_path, "list", "--json").stdout)[0]["state"] == "expired"


@pytest.mark.parametrize(
    "arguments", [["create", "--name", "x"], ["create", "--name", "x", "--scope", "all"]]
)
def test_a_key_without_a_scope_is_wrong_usage(tmp_path: Path, arguments: list[str]) -> None:
    assert run(tmp_path, *arguments).exit_code == 2


def test_elsewhere_than_on_loopback_a_start_needs_a_key(tmp_path: Path) -> None:
    settings = Settings(host="0.0.0.0", data_dir=tmp_path / "data")
    assert settings.keys_required
    assert not _has_key(settings)
    run(tmp_path / "data", "create", "--name", "old", "--scope", "read", "--days", "0")
    assert not _has_key(settings)
    run(tmp_path / "data", "create", "--name", "new", "--scope", "read")
    assert _has_key(settings)


def test_the_refused_start_says_what_to_do(tmp_path: Path) -> None:
    """`keys` on loopback takes the same way as any other address; no test listens elsewhere."""
    with (
        pytest.raises(AssertionError) as caught,
        running(tmp_path / "data", {"FOLDSERVE_AUTH": "keys"}),
    ):
        pass
    text = str(caught.value)
    assert "needs an API key" in text
    assert "foldserve keys create" in text
    assert "insecure-off" in text
