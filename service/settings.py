"""Every knob of the service in one frozen object, read from `FOLDSERVE_*` variables.

Each field states its default, its unit and what it is for; `Settings.table()` gives the same as
rows, from which the README's configuration table is checked. A variable that starts with the
prefix and names no field is an error, because a misspelt limit is a limit that is not there.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

PREFIX = "FOLDSERVE_"
KIB, MIB, GIB = 2**10, 2**20, 2**30

# Variables with the prefix that are no settings: tests and the commands for a remote service read
# them, and one is what a service tells itself when it starts anew.
_NOT_SETTINGS = frozenset(
    {"FOLDSERVE_API_KEY", "FOLDSERVE_CONFORMANCE", "FOLDSERVE_RESTARTED_AT", "FOLDSERVE_URL"}
)


_HOST_NAME = re.compile(r"\*|(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_ORIGIN = re.compile(r"https?://[A-Za-z0-9_.\[\]:-]+")
_Names = Annotated[tuple[str, ...], NoDecode]


def _setting(default: Any, unit: str, description: str, **constraints: Any) -> Any:
    return Field(
        default=default,
        description=description,
        json_schema_extra={"unit": unit},
        **constraints,
    )


_PAGE_HEAD = """\
# Configuration

Environment variables, read once at start. One that starts with `FOLDSERVE_` and is not listed is
an error. This page is written by `make docs` from `service/settings.py`.

| variable | default | unit | what |
|---|---|---|---|
"""


@dataclass(frozen=True)
class SettingRow:
    """One setting as the documents show it: variable name, default as text, unit, description."""

    variable: str
    default: str
    unit: str
    description: str


class Settings(BaseSettings):
    """The service's configuration; immutable once read.

    Raises pydantic's `ValidationError` for a value out of range, an unknown keyword, or an unknown
    `FOLDSERVE_` variable; `explain` turns that into lines for a person.
    """

    model_config: ClassVar[SettingsConfigDict] = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", validate_default=True
    )

    # Where it listens and where it keeps things
    host: str = _setting("127.0.0.1", "address", "Address to listen on.", min_length=1)
    port: int = _setting(8000, "TCP port", "Port to listen on; 0 takes a free one.", ge=0, le=65535)
    grpc_port: int = _setting(
        0,
        "TCP port",
        "Port for the Open Inference Protocol over gRPC (extra `grpc`); 0 leaves it off.",
        ge=0,
        le=65535,
    )
    http_processes: int = _setting(
        1,
        "processes",
        "Processes that do the HTTP work; with 1 the process that computes does it too (Linux).",
        ge=1,
        le=64,
    )
    http_shared_bytes: int = _setting(
        256 * MIB,
        "bytes",
        "Memory that each of several HTTP processes shares for bodies; larger ones are copied.",
        ge=1 * MIB,
    )
    data_dir: Path = _setting(Path(".data"), "path", "Folder of the embedded store and scratch.")
    models: Annotated[tuple[str, ...], NoDecode] = _setting(
        (), "NAME=PATH", "Checkpoints to convert and serve from the start, separated by commas."
    )
    database_url: str | None = _setting(
        None,
        "URL",
        "Catalog as an SQLAlchemy URL; unset means SQLite inside `data_dir`.",
        repr=False,
    )
    blob_url: str | None = _setting(
        None, "URL or path", "Blob store; unset means a folder inside `data_dir`."
    )
    log_format: Literal["auto", "console", "json"] = _setting(
        "auto", "name", "Log lines for people or for machines; `auto` asks whether stderr is a tty."
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", "name", "Lowest level that is logged."
    )
    access_log: bool = _setting(False, "flag", "Log one line for every request.")
    otlp_endpoint: str | None = _setting(
        None, "URL", "OpenTelemetry collector (OTLP over HTTP) that gets traces; unset sends none."
    )
    drain_seconds: float = _setting(
        25.0, "s", "Longest wait for running requests after SIGTERM.", ge=0, le=600
    )
    keep_alive_seconds: float = _setting(
        30.0, "s", "How long an idle HTTP connection is kept open.", gt=0, le=3600
    )

    # Who may ask, and how much at once
    auth: Literal["auto", "keys", "insecure-off"] = _setting(
        "auto",
        "name",
        "Whether requests need an API key; `auto` asks for one unless `host` is loopback.",
    )
    key_refresh_seconds: float = _setting(
        2.0, "s", "Longest time until a created or revoked key counts.", gt=0, le=60
    )
    allowed_hosts: _Names = _setting(
        (),
        "names",
        "DNS names that it answers to without keys, beside addresses and names without a dot; "
        "`*` for any, `*.example.com` for those below one. If set, it holds with keys too.",
    )
    cors_origins: _Names = _setting(
        (), "origins", "Origins whose pages may use the API, such as `https://app.example.com`."
    )
    rate_limit: float = _setting(
        0.0, "requests/s", "Lasting rate of one key, or address without keys; 0 for any.", ge=0
    )
    rate_limit_burst: int = _setting(
        100, "requests", "Requests beyond `rate_limit` that may come at once.", ge=1
    )
    max_connections: int = _setting(
        1000, "connections", "Connections held at once; one more is answered 503.", ge=1
    )
    max_head_bytes: int = _setting(
        64 * KIB, "bytes", "Largest head of a request: address and headers; then 431.", ge=1 * KIB
    )
    max_headers: int = _setting(100, "headers", "Most headers of a request; then 431.", ge=1)
    max_url_bytes: int = _setting(
        32 * KIB, "bytes", "Longest path and query of a request; then 414.", ge=64, le=65_535
    )
    head_seconds: float = _setting(
        10.0, "s", "Longest time from a request's first byte to the end of its head.", gt=0
    )
    min_bytes_per_second: float = _setting(
        1024.0,
        "bytes/s",
        "A body that comes, or an answer that is taken, more slowly on the whole is given up.",
        ge=0,
    )
    response_idle_seconds: float = _setting(
        60.0, "s", "How often the taking of an answer is looked at; none ends the connection.", gt=0
    )
    max_parts: int = _setting(1024, "parts", "Most parts of a multipart body.", ge=1)
    max_part_header_bytes: int = _setting(
        8 * KIB, "bytes", "Largest headers of one part of a multipart body.", ge=64
    )

    # Uploads
    max_upload_bytes: int = _setting(
        4 * GIB, "bytes", "Largest checkpoint that is accepted; more answers 413.", ge=1
    )
    max_config_bytes: int = _setting(
        1 * MIB, "bytes", "Largest `config` of an upload, labels included.", ge=2
    )
    upload_idle_seconds: float = _setting(
        60.0, "s", "An upload that sends nothing for this long is given up.", gt=0
    )
    max_wait_seconds: float = _setting(
        600.0, "s", "Longest `Prefer: wait=` that an upload honours.", ge=0
    )

    # Reading untrusted checkpoints
    reader_archive_entries: int = _setting(
        100_000, "entries", "Most entries of a zip container.", ge=1
    )
    reader_archive_expansion: float = _setting(
        1.05, "ratio", "Most bytes that a zip's entries may claim, relative to the file.", ge=1
    )
    reader_header_bytes: int = _setting(
        32 * MIB, "bytes", "Largest JSON header of a safetensors or torch.export file.", ge=8
    )
    reader_pickle_bytes: int = _setting(
        32 * MIB, "bytes", "Largest pickle of a torch file, its tensors not counted.", ge=8
    )
    reader_pickle_operations: int = _setting(
        2_000_000, "instructions", "Longest pickle; a tensor takes about 40.", ge=1
    )
    reader_tensors: int = _setting(50_000, "tensors", "Most tensors of a checkpoint.", ge=1)
    reader_tensor_expansion: float = _setting(
        2.0, "ratio", "Most tensor bytes that a file may claim, relative to its own size.", ge=1
    )
    reader_key_characters: int = _setting(512, "characters", "Longest key of a state dict.", ge=1)
    reader_nesting: int = _setting(
        100, "levels", "Deepest nesting of lists and tuples in a pickle.", ge=4
    )
    reader_graph_values: int = _setting(
        1_000_000, "values", "Most values of one JSON header or document of a file.", ge=1
    )
    reader_graph_nodes: int = _setting(
        20_000, "calls", "Most operator calls of a torch.export archive.", ge=1
    )
    reader_graph_constant_bytes: int = _setting(
        64 * MIB, "bytes", "Largest sum of the constants that such a graph makes.", ge=1
    )
    reader_graph_value_bytes: int = _setting(
        8192 * MIB, "bytes", "Largest value inside such a graph, for three samples.", ge=1
    )

    # Conversion, in its child process
    conversion_seconds: float = _setting(
        600.0, "s", "Longest time that one conversion may take.", gt=0
    )
    conversion_memory_bytes: int = _setting(
        8 * GIB, "bytes", "Private memory that one conversion may take.", ge=64 * MIB
    )
    conversion_attempts: int = _setting(
        2, "attempts", "Times a conversion that the service's end interrupted is taken up.", ge=1
    )
    conversion_stale_seconds: float = _setting(
        60.0,
        "s",
        "A conversion without a sign of life for this long is taken from its (dead) service.",
        gt=0,
    )
    conversion_threads: int = _setting(
        1, "threads", "CPU threads of a conversion, so that it does not starve serving.", ge=1
    )
    conversion_priority: Literal["idle", "low", "normal"] = _setting(
        "idle",
        "name",
        "When a conversion runs: only when nothing else wants to, with the lowest niceness, or as "
        "any process.",
    )
    conversion_poll_seconds: float = _setting(
        0.5, "s", "How often an idle worker looks for queued versions.", gt=0
    )

    # Serving
    device: Literal["auto", "cpu", "cuda"] = _setting(
        "auto", "name", "Device that serves; `auto` takes a CUDA device when there is one."
    )
    backend: Literal["auto", "torch", "openvino"] = _setting(
        "auto", "name", "Engine of versions that name none; `auto` measures and keeps the fastest."
    )
    torch_threads: int = _setting(
        0,
        "threads",
        "Most CPU threads of one forward pass; 0 means every CPU that is available.",
        ge=0,
    )
    max_batch: int = _setting(
        32, "rows", "Largest batch that the service prepares and runs at once.", ge=1, le=4096
    )
    max_activation_bytes: int = _setting(
        4 * GIB,
        "bytes",
        "Most memory for the values inside a network in one run; larger batches are not prepared.",
        ge=1 * MIB,
    )
    queue_rows: int = _setting(
        1024, "rows", "Rows that may wait for one model; more answers 429.", ge=1
    )
    inline_seconds: float = _setting(
        0.01,
        "s",
        "A batch known to compute faster than this on one CPU thread runs on the event loop when "
        "nothing else computes: another thread would contend with the loop for the interpreter. "
        "Everything else waits that long. 0 = never.",
        ge=0,
        le=0.05,
    )
    retry_after_seconds: int = _setting(
        1, "s", "`Retry-After` of an answer that asks the client to come back.", ge=1
    )
    request_seconds: float = _setting(
        30.0, "s", "Longest time a prediction may take, waiting included; then 504.", gt=0
    )
    max_body_bytes: int = _setting(
        128 * MIB, "bytes", "Largest body of a prediction; more answers 413.", ge=1
    )
    max_json_bytes: int = _setting(
        16 * MIB, "bytes", "Largest JSON body; tensors of more are better sent as npy.", ge=2
    )
    max_image_pixels: int = _setting(
        50_000_000, "pixels", "Largest image that is decoded, checked before decoding.", ge=1
    )
    max_image_scans: int = _setting(
        64, "scans", "Most passes of a progressive JPEG; files that people make have ten.", ge=1
    )
    max_images: int = _setting(256, "images", "Most images in one multipart prediction.", ge=1)
    body_idle_seconds: float = _setting(
        30.0, "s", "A prediction whose body stalls for this long is given up.", gt=0
    )
    decode_threads: int = _setting(2, "threads", "Threads that decode images.", ge=1)
    top_k: int = _setting(5, "labels", "Labels in an answer that does not ask with `top_k`.", ge=1)
    follow_seconds: float = _setting(
        2.0, "s", "How often a service looks for what others changed in a shared catalog.", gt=0
    )
    fault_check_seconds: float = _setting(
        0.5, "s", "How often the service looks for models that are out of order.", gt=0, le=2
    )
    fault_attempts: int = _setting(
        5, "attempts", "Reloads of a faulty model until it no longer holds readiness back.", ge=1
    )
    fault_wait_seconds: float = _setting(
        60.0, "s", "Longest wait between two reloads of a faulty model.", gt=0
    )
    restart_limit: int = _setting(
        3,
        "restarts",
        "Times that the service starts itself anew within `restart_window_seconds` because a "
        "device is lost; the next time, with 0 the first, it exits with status 1.",
        ge=0,
    )
    restart_window_seconds: float = _setting(
        600.0, "s", "Within this time restarts after a lost device are counted.", gt=0
    )
    idle_unload_seconds: float = _setting(
        600.0, "s", "Training forms and versions that are no default are unloaded after this.", gt=0
    )

    # Benchmark
    benchmark_seconds: float = _setting(
        20.0, "s", "Time budget of one benchmark, all batch sizes together.", gt=0, le=3600
    )
    benchmark_batch_sizes: Annotated[tuple[int, ...], NoDecode] = _setting(
        (1, 8), "rows", "Batch sizes that a benchmark measures, separated by commas.", min_length=1
    )

    # Lists and progress
    page_size: int = _setting(50, "items", "Items of a page that does not ask with `limit`.", ge=1)
    max_page_size: int = _setting(500, "items", "Most items that `limit` may ask for.", ge=1)
    events_poll_seconds: float = _setting(
        0.2, "s", "How often a progress stream looks for news.", gt=0
    )
    events_heartbeat_seconds: float = _setting(
        15.0, "s", "Longest silence of a progress stream before a comment line.", gt=0
    )

    @model_validator(mode="before")
    @classmethod
    def _known_variables_only(cls, values: Any) -> Any:
        unknown = unknown_variables(os.environ)
        if unknown:
            raise ValueError("; ".join(_unknown_sentence(name) for name in unknown))
        return values

    @field_validator("database_url", "blob_url", "otlp_endpoint", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: Any) -> Any:
        return None if value == "" else value

    @field_validator(
        "benchmark_batch_sizes", "allowed_hosts", "cors_origins", "models", mode="before"
    )
    @classmethod
    def _comma_separated(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return tuple(part.strip() for part in value.split(",")) if value.strip() else ()

    @field_validator("allowed_hosts")
    @classmethod
    def _host_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not _HOST_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no host name; give names without scheme and port")
        return tuple(name.lower() for name in value)

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is no origin; write scheme://host[:port]")
        return value

    @field_validator("benchmark_batch_sizes")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(size < 1 for size in value):
            raise ValueError("every batch size is at least 1")
        return value

    @model_validator(mode="after")
    def _pages_agree(self) -> Settings:
        if self.page_size > self.max_page_size:
            raise ValueError("page_size must not exceed max_page_size")
        return self

    @property
    def keys_required(self) -> bool:
        """Whether a request needs an API key: off loopback by default, and never if waived."""
        return self.auth == "keys" or (self.auth == "auto" and not is_loopback(self.host))

    @property
    def effective_database_url(self) -> str:
        """`database_url`, or SQLite inside `data_dir`."""
        return self.database_url or f"sqlite:///{(self.data_dir / 'catalog.sqlite3').absolute()}"

    @property
    def effective_blob_url(self) -> str:
        """`blob_url`, or a folder inside `data_dir`."""
        return self.blob_url or str((self.data_dir / "blobs").absolute())

    @property
    def blob_cache_dir(self) -> Path:
        """Folder for uploads under way, and for copies of remote blobs."""
        return self.data_dir / "blobs"

    @property
    def scratch_dir(self) -> Path:
        """Folder for files of conversions under way; emptied at start."""
        return self.data_dir / "scratch"

    @classmethod
    def table(cls) -> tuple[SettingRow, ...]:
        """Every setting in order of declaration, as the documents show it."""
        rows = []
        for name, field in cls.model_fields.items():
            extra = field.json_schema_extra
            unit = str(extra["unit"]) if isinstance(extra, dict) else ""
            rows.append(
                SettingRow(
                    variable=PREFIX + name.upper(),
                    default=_default_text(field.default),
                    unit=unit,
                    description=field.description or "",
                )
            )
        return tuple(rows)

    @classmethod
    def page(cls) -> str:
        """The configuration page of the documents, in Markdown."""
        rows = "".join(
            f"| `{row.variable}` | {f'`{row.default}`' if row.default else ''} "
            f"| {row.unit} | {row.description} |\n"
            for row in cls.table()
        )
        return _PAGE_HEAD + rows


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine only."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def unknown_variables(environment: Iterable[str]) -> tuple[str, ...]:
    """The names that carry the prefix and are no setting, sorted."""
    known = {PREFIX + name.upper() for name in Settings.model_fields} | _NOT_SETTINGS
    return tuple(
        sorted(n for n in environment if n.upper().startswith(PREFIX) and n.upper() not in known)
    )


def explain(error: ValidationError) -> tuple[str, ...]:
    """One line for each thing wrong with the configuration, naming the variable and the value."""
    lines = []
    for item in error.errors(include_url=False):
        where = item["loc"]
        message = item["msg"].removeprefix("Value error, ")
        if not where:
            lines.append(message)
        elif item["type"] == "extra_forbidden":
            lines.append(_unknown_sentence(PREFIX + str(where[0]).upper()))
        else:
            variable = PREFIX + str(where[0]).upper()
            lines.append(f"{variable}={item.get('input')!s}: {message}")
    return tuple(lines)


def _unknown_sentence(name: str) -> str:
    known = [PREFIX + field.upper() for field in Settings.model_fields]
    near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.0)
    return f"{name} is not a setting; the nearest one is {near[0]}"


def _default_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


if __name__ == "__main__":
    print(Settings.page(), end="")
