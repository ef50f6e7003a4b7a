from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import PREFIX, Settings, explain, unknown_variables


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)


def test_defaults_are_valid_and_documented() -> None:
    Settings()
    rows = Settings.table()
    assert len(rows) == len(Settings.model_fields)
    for row in rows:
        assert re.fullmatch(r"FOLDSERVE_[A-Z0-9_]+", row.variable)
        assert row.unit, row.variable
        assert row.description.endswith("."), row.variable


def test_every_default_survives_the_way_through_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for row in Settings.table():
        monkeypatch.setenv(row.variable, row.default)
    assert Settings() == Settings.model_construct(
        **{name: field.default for name, field in Settings.model_fields.items()}
    )


def test_environment_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FOLDSERVE_PORT", "0")
    monkeypatch.setenv("FOLDSERVE_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("FOLDSERVE_BENCHMARK_BATCH_SIZES", "1, 4,16")
    settings = Settings()
    assert settings.port == 0
    assert settings.data_dir == tmp_path
    assert settings.benchmark_batch_sizes == (1, 4, 16)


def test_an_argument_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDSERVE_PORT", "9000")
    assert Settings(port=9001).port == 9001


def test_settings_are_frozen() -> None:
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [
        ("FOLDSERVE_MAX_UPLOAD_BYTE", "FOLDSERVE_MAX_UPLOAD_BYTES"),
        ("FOLDSERVE_DATADIR", "FOLDSERVE_DATA_DIR"),
        ("foldserve_prot", "FOLDSERVE_PORT"),
    ],
)
def test_unknown_variable_names_the_nearest(
    monkeypatch: pytest.MonkeyPatch, typo: str, nearest: str
) -> None:
    monkeypatch.setenv(typo, "1")
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert explain(caught.value) == (f"{typo} is not a setting; the nearest one is {nearest}",)


def test_only_the_prefix_is_ours() -> None:
    names = ["PATH", "FOLDSERVER_PORT", "FOLDSERVE_PORT", "FOLDSERVE_CONFORMANCE"]
    assert unknown_variables(names) == ()


def test_unknown_keyword_is_refused() -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(prot=1)  # type: ignore[call-arg]
    assert explain(caught.value) == (
        "FOLDSERVE_PROT is not a setting; the nearest one is FOLDSERVE_PORT",
    )


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PORT", "65536"),
        ("PORT", "-1"),
        ("PORT", "http"),
        ("HOST", ""),
        ("DEVICE", "tpu"),
        ("LOG_FORMAT", "xml"),
        ("MAX_UPLOAD_BYTES", "0"),
        ("CONVERSION_SECONDS", "0"),
        ("CONVERSION_MEMORY_BYTES", "1"),
        ("BENCHMARK_BATCH_SIZES", "1,0"),
        ("BENCHMARK_BATCH_SIZES", "one"),
        ("MAX_PAGE_SIZE", "1"),
        ("AUTH", "off"),
        ("ALLOWED_HOSTS", "http://a.example"),
        ("ALLOWED_HOSTS", "a.example:80"),
        ("CORS_ORIGINS", "*"),
        ("CORS_ORIGINS", "https://a.example/path"),
        ("MAX_URL_BYTES", "70000"),
    ],
)
def test_bad_values_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(PREFIX + variable, value)
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert any(variable.lower() in line.lower() for line in explain(caught.value))


def test_store_addresses_follow_the_data_folder(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    assert settings.effective_database_url == f"sqlite:///{tmp_path}/catalog.sqlite3"
    assert settings.effective_blob_url == f"{tmp_path}/blobs"
    assert settings.scratch_dir == tmp_path / "scratch"


def test_store_addresses_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDSERVE_DATABASE_URL", "postgresql+psycopg://h/db")
    monkeypatch.setenv("FOLDSERVE_BLOB_URL", "s3://bucket/folder")
    settings = Settings()
    assert settings.effective_database_url == "postgresql+psycopg://h/db"
    assert settings.effective_blob_url == "s3://bucket/folder"


@pytest.mark.parametrize(
    ("auth", "host", "required"),
    [
        ("auto", "127.0.0.1", False),
        ("auto", "127.9.9.9", False),
        ("auto", "::1", False),
        ("auto", "localhost", False),
        ("auto", "0.0.0.0", True),
        ("auto", "::", True),
        ("auto", "10.0.0.1", True),
        ("auto", "localhost.example.com", True),
        ("keys", "127.0.0.1", True),
        ("insecure-off", "0.0.0.0", False),
    ],
)
def test_keys_are_asked_for_off_loopback(auth: str, host: str, required: bool) -> None:
    assert Settings(auth=auth, host=host).keys_required is required  # type: ignore[arg-type]


def test_names_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDSERVE_ALLOWED_HOSTS", "A.example, *.b.example")
    monkeypatch.setenv("FOLDSERVE_CORS_ORIGINS", "https://a.example,http://localhost:3000")
    assert Settings().allowed_hosts == ("a.example", "*.b.example")
    assert Settings().cors_origins == ("https://a.example", "http://localhost:3000")
