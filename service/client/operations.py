"""Every operation once, as steps that a blocking and an awaiting client both walk."""

from __future__ import annotations

import io
import json
import os
import random
import re
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import httpx

from service.client.bodies import NPY, Counted, body_of, calibration_of
from service.client.types import Form, Format, Json, Label, Transferred, Version
from service.errors import BadInput, DeadlineExceeded, FoldserveError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from service.client.types import Input, Rows

T = TypeVar("T")

API_KEY_VARIABLE = "FOLDSERVE_API_KEY"
"""The environment variable from which a client takes its API key if it is given none."""

BUSY = frozenset({429, 503})
_POLL_SECONDS = 0.25
_SUFFIXES = re.compile(r"(\.(pth|pt|tar|safetensors|bundle))+$", re.IGNORECASE)


@dataclass(frozen=True)
class Call:
    """One request, as the steps below ask for it."""

    method: str
    path: str
    options: Json = field(default_factory=dict)


@dataclass(frozen=True)
class Pause:
    """Seconds to wait."""

    seconds: float


# An operation is written once, as a generator that yields what it needs and gets the response.
Steps = Generator[Call | Pause, httpx.Response, T]


def model_name(path: str | Path) -> str:
    """A valid model name from a file's name: `RepVGG-A0-train.pth` gives `repvgg-a0-train`."""
    stem = _SUFFIXES.sub("", Path(path).name).lower()
    name = re.sub(r"[^a-z0-9._-]+", "-", stem).strip("._-")[:63]
    if not name:
        raise BadInput(f"{path} gives no model name.", remedy="Name the model.")
    return name


def key_header(api_key: str | None) -> dict[str, str]:
    """The header that carries the key given, or else the environment's."""
    key = api_key or os.environ.get(API_KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}


class Operations:
    """What the service offers, as steps; nothing here sends or waits."""

    def _upload(
        self,
        file: BinaryIO,
        filename: str,
        model: str,
        config: Mapping[str, Any] | None,
        calibration: Rows | None,
        progress: Transferred | None,
        wait: float | None,
    ) -> Steps[Version]:
        # The answer comes at once and the wait is ours: a proxy may cut long silences.
        form: Json = {"files": {"checkpoint": (filename, Counted(file, progress))}}
        if calibration is not None:
            form["files"]["calibration"] = ("calibration.npy", calibration_of(calibration))
        if config is not None:
            form["data"] = {"config": json.dumps(dict(config))}
        response = yield Call("POST", f"/v1/models/{model}/versions", form)
        version = Version.of(response.json())
        return version if wait is None else (yield from self._wait(version, wait))

    def _wait(self, version: Version, seconds: float) -> Steps[Version]:
        deadline = time.monotonic() + seconds
        while not version.final:
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(
                    f"Version {version.version} of {version.model} is still {version.state}.",
                    remedy="Wait for it again; the conversion goes on.",
                )
            yield Pause(_POLL_SECONDS)
            version = yield from self._version(version.model, version.version)
        if version.error is not None:
            raise FoldserveError.from_dict(version.error)
        return version

    def _version(self, model: str, version: int) -> Steps[Version]:
        response = yield Call("GET", f"/v1/models/{model}/versions/{version}")
        return Version.of(response.json())

    def _json(self, method: str, path: str, **options: Any) -> Steps[Json]:
        response = yield Call(method, path, options)
        body: Json = response.json()
        return body

    def _page(self, path: str) -> Steps[tuple[list[Json], str | None]]:
        body = yield from self._json("GET", path)
        return body["items"], body["next"]

    def _delete(self, path: str) -> Steps[None]:
        yield Call("DELETE", path)

    def _predict(
        self, model: str, given: Input, version: int | None, form: Form, top_k: int | None
    ) -> Steps[list[list[Label]]]:
        query = query_of(version=version, form=form, top_k=top_k)
        options = {**body_of(given), "params": query}
        response = yield Call("POST", f"/v1/models/{model}/predict", options)
        rows = response.json().get("predictions")
        if rows is None:
            raise BadInput(f"{model} does not classify.", remedy="Use `infer` for its outputs.")
        return [[Label(**label) for label in row["top"]] for row in rows]

    def _infer(
        self, model: str, array: NDArray[Any], version: int | None, form: Form
    ) -> Steps[NDArray[np.float32]]:
        import numpy as np

        options = {**body_of(array), "params": query_of(version=version, form=form)}
        options["headers"]["Accept"] = NPY
        response = yield Call("POST", f"/v1/models/{model}/predict", options)
        result: NDArray[np.float32] = np.load(io.BytesIO(response.content), allow_pickle=False)
        return result

    def _change(self, model: str, version: int, changes: Json) -> Steps[Version]:
        path = f"/v1/models/{model}/versions/{version}"
        return Version.of((yield from self._json("PATCH", path, json=changes)))

    def _benchmark(
        self, model: str, batch_sizes: Sequence[int] | None, seconds: float | None
    ) -> Steps[Json]:
        asked = {"batch_sizes": list(batch_sizes) if batch_sizes else None, "seconds": seconds}
        path = f"/v1/models/{model}/benchmark"
        return (yield from self._json("POST", path, json=asked, timeout=None))

    def _events_call(self, version: Version, after: int) -> Call:
        path = f"/v1/models/{version.model}/versions/{version.version}/events"
        return Call("GET", path, {"headers": {"Last-Event-ID": str(after)}, "timeout": None})

    def _download_path(self, model: str, version: int, form: Form, format: Format) -> str:
        path = f"/v1/models/{model}/versions/{version}/checkpoints/{form}"
        return path if form == "train" else f"{path}?format={format}"


def patience(response: httpx.Response, attempt: int) -> float:
    """Seconds until the next try: what the service asks for, or doubling from 0.5 with jitter."""
    try:
        return max(0.0, float(response.headers["Retry-After"]))
    except (KeyError, ValueError):
        return min(8.0, 0.5 * 2.0**attempt) * random.uniform(0.75, 1.25)


def error_of(response: httpx.Response) -> FoldserveError:
    """The service's own error, from its problem document."""
    try:
        return FoldserveError.from_dict(response.json())
    except (ValueError, AttributeError):  # something in between answered
        return FoldserveError(
            f"{response.request.method} {response.request.url} answered {response.status_code}.",
            status=response.status_code,
        )


def query_of(**values: Any) -> Json:
    """Query parameters without those that are None: the service has defaults for them."""
    return {name: value for name, value in values.items() if value is not None}
