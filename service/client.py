"""A client of a running Foldserve: `Client` blocks, `AsyncClient` awaits, both do the same.

    with Client("http://127.0.0.1:8000") as client:
        version = client.upload("RepVGG-A0-train.pth", wait=120)
        labels = client.predict(version.model, "cat.jpg")

A refusal is raised as the service's own error (`service.errors`), with its detail and remedy. Busy
answers (429, 503) are repeated after the time that the service asks for.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Self, TypeVar

import httpx

from service.errors import BadInput, DeadlineExceeded, FoldserveError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image

    Picture = str | Path | bytes | Image
    Input = Picture | Sequence[Picture] | NDArray[Any]

T = TypeVar("T")
Json = dict[str, Any]
Form = Literal["deploy", "train"]
Format = Literal["safetensors", "pth", "bundle"]
Transferred = Callable[[int, int], None]
"""Told (bytes sent so far, bytes in all) while a file is uploaded."""

DEFAULT_URL = "http://127.0.0.1:8000"
API_KEY_VARIABLE = "FOLDSERVE_API_KEY"
"""The environment variable from which a client takes its API key if it is given none."""

_NPY = "application/x-npy"
_BUSY = frozenset({429, 503})
_IMAGES = {b"\xff\xd8": "image/jpeg", b"\x89P": "image/png", b"RI": "image/webp"}
_POLL_SECONDS = 0.25
_SUFFIXES = re.compile(r"(\.(pth|pt|tar|safetensors|bundle))+$", re.IGNORECASE)


@dataclass(frozen=True)
class Version:
    """A version as the service describes it; `raw` is the whole resource."""

    model: str
    version: int
    state: str
    checkpoint: Json
    architecture: Json | None
    fusion: Json | None
    error: Json | None
    raw: Json = field(repr=False)

    @classmethod
    def of(cls, raw: Json) -> Version:
        names = ("model", "version", "state", "checkpoint", "architecture", "fusion", "error")
        return cls(**{name: raw[name] for name in names}, raw=raw)

    @property
    def final(self) -> bool:
        """Whether the conversion has ended."""
        return self.state in ("ready", "rejected")


@dataclass(frozen=True)
class Label:
    """One class of a prediction with its softmax probability."""

    label: str
    index: int
    score: float


@dataclass(frozen=True)
class _Call:
    """One request, as the steps below ask for it."""

    method: str
    path: str
    options: Json = field(default_factory=dict)


@dataclass(frozen=True)
class _Pause:
    """Seconds to wait."""

    seconds: float


# An operation is written once, as a generator that yields what it needs and gets the response.
_Steps = Generator[_Call | _Pause, httpx.Response, T]


def model_name(path: str | Path) -> str:
    """A valid model name from a file's name: `RepVGG-A0-train.pth` gives `repvgg-a0-train`."""
    stem = _SUFFIXES.sub("", Path(path).name).lower()
    name = re.sub(r"[^a-z0-9._-]+", "-", stem).strip("._-")[:63]
    if not name:
        raise BadInput(f"{path} gives no model name.", remedy="Name the model.")
    return name


def _key_header(api_key: str | None) -> dict[str, str]:
    """The header that carries the key given, or else the environment's."""
    key = api_key or os.environ.get(API_KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}


class _Operations:
    """What the service offers, as steps; nothing here sends or waits."""

    def _upload(
        self,
        file: BinaryIO,
        filename: str,
        model: str,
        config: Mapping[str, Any] | None,
        progress: Transferred | None,
        wait: float | None,
    ) -> _Steps[Version]:
        # The answer comes at once and the wait is ours: a proxy may cut long silences.
        form: Json = {"files": {"checkpoint": (filename, _Counted(file, progress))}}
        if config is not None:
            form["data"] = {"config": json.dumps(dict(config))}
        response = yield _Call("POST", f"/v1/models/{model}/versions", form)
        version = Version.of(response.json())
        return version if wait is None else (yield from self._wait(version, wait))

    def _wait(self, version: Version, seconds: float) -> _Steps[Version]:
        deadline = time.monotonic() + seconds
        while not version.final:
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(
                    f"Version {version.version} of {version.model} is still {version.state}.",
                    remedy="Wait for it again; the conversion goes on.",
                )
            yield _Pause(_POLL_SECONDS)
            version = yield from self._version(version.model, version.version)
        if version.error is not None:
            raise FoldserveError.from_dict(version.error)
        return version

    def _version(self, model: str, version: int) -> _Steps[Version]:
        response = yield _Call("GET", f"/v1/models/{model}/versions/{version}")
        return Version.of(response.json())

    def _json(self, method: str, path: str, **options: Any) -> _Steps[Json]:
        response = yield _Call(method, path, options)
        body: Json = response.json()
        return body

    def _page(self, path: str) -> _Steps[tuple[list[Json], str | None]]:
        body = yield from self._json("GET", path)
        return body["items"], body["next"]

    def _delete(self, path: str) -> _Steps[None]:
        yield _Call("DELETE", path)

    def _predict(
        self, model: str, given: Input, version: int | None, form: Form, top_k: int | None
    ) -> _Steps[list[list[Label]]]:
        query = _query(version=version, form=form, top_k=top_k)
        options = {**_body(given), "params": query}
        response = yield _Call("POST", f"/v1/models/{model}/predict", options)
        rows = response.json().get("predictions")
        if rows is None:
            raise BadInput(f"{model} does not classify.", remedy="Use `infer` for its outputs.")
        return [[Label(**label) for label in row["top"]] for row in rows]

    def _infer(
        self, model: str, array: NDArray[Any], version: int | None, form: Form
    ) -> _Steps[NDArray[np.float32]]:
        import numpy as np

        options = {**_body(array), "params": _query(version=version, form=form)}
        options["headers"]["Accept"] = _NPY
        response = yield _Call("POST", f"/v1/models/{model}/predict", options)
        result: NDArray[np.float32] = np.load(io.BytesIO(response.content), allow_pickle=False)
        return result

    def _benchmark(
        self, model: str, batch_sizes: Sequence[int] | None, seconds: float | None
    ) -> _Steps[Json]:
        asked = {"batch_sizes": list(batch_sizes) if batch_sizes else None, "seconds": seconds}
        path = f"/v1/models/{model}/benchmark"
        return (yield from self._json("POST", path, json=asked, timeout=None))

    def _download_path(self, model: str, version: int, form: Form, format: Format) -> str:
        path = f"/v1/models/{model}/versions/{version}/checkpoints/{form}"
        return path if form == "train" else f"{path}?format={format}"


class Client(_Operations):
    """The blocking client. `retries` is how often a busy answer is repeated.

    `api_key` is by default what the environment variable `FOLDSERVE_API_KEY` holds.

    Raises the service's errors (`FoldserveError` kinds) and httpx's transport errors.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._retries = retries
        self._http = httpx.Client(
            base_url=url, timeout=timeout, transport=transport, headers=_key_header(api_key)
        )

    def upload(
        self,
        checkpoint: str | Path,
        model: str | None = None,
        *,
        config: Mapping[str, Any] | None = None,
        progress: Transferred | None = None,
        wait: float | None = None,
    ) -> Version:
        """Upload a file as the next version of `model` (by default named after the file).

        With `wait` (seconds) it returns when the version is ready and raises why it was rejected.
        """
        path = Path(checkpoint)
        with path.open("rb") as file:
            name = model or model_name(path)
            return self._run(self._upload(file, path.name, name, config, progress, wait))

    def wait(self, version: Version, seconds: float = 600.0) -> Version:
        """The version once it is ready. Raises why it was rejected, or DeadlineExceeded."""
        return self._run(self._wait(version, seconds))

    def version(self, model: str, version: int) -> Version:
        """One version."""
        return self._run(self._version(model, version))

    def model(self, model: str) -> Json:
        """One model with its newest versions."""
        return self._run(self._json("GET", f"/v1/models/{model}"))

    def models(self) -> Iterator[Json]:
        """Every model, page by page."""
        return self._items("/v1/models")

    def versions(self, model: str) -> Iterator[Version]:
        """Every version of a model, the newest first."""
        return (Version.of(item) for item in self._items(f"/v1/models/{model}/versions"))

    def events(self, version: Version, after: int = 0) -> Iterator[Json]:
        """Progress as it happens, until the conversion ends: `{"id", "event", "data"}`."""
        path = f"/v1/models/{version.model}/versions/{version.version}/events"
        headers = {"Last-Event-ID": str(after)}
        with self._http.stream("GET", path, headers=headers, timeout=None) as response:
            if response.is_error:
                response.read()
                raise _error(response)
            decoder = _EventDecoder()
            for line in response.iter_lines():
                if (event := decoder.line(line)) is not None:
                    yield event

    def report(self, model: str, version: int) -> Json:
        """The whole fusion report."""
        return self._run(self._json("GET", f"/v1/models/{model}/versions/{version}/report"))

    def download(
        self,
        model: str,
        version: int,
        target: str | Path,
        form: Form = "deploy",
        format: Format = "safetensors",
    ) -> Path:
        """Save a checkpoint to `target`, in pieces; returns the path."""
        with self._http.stream(
            "GET", self._download_path(model, version, form, format)
        ) as response:
            if response.is_error:
                response.read()
                raise _error(response)
            with Path(target).open("wb") as file:
                for chunk in response.iter_bytes(1 << 20):
                    file.write(chunk)
        return Path(target)

    def predict(
        self,
        model: str,
        given: Input,
        *,
        version: int | None = None,
        form: Form = "deploy",
        top_k: int | None = None,
    ) -> list[list[Label]]:
        """The best labels of each row, of an image (path, bytes, PIL), several, or an array."""
        return self._run(self._predict(model, given, version, form, top_k))

    def infer(
        self,
        model: str,
        array: NDArray[Any],
        *,
        version: int | None = None,
        form: Form = "deploy",
    ) -> NDArray[np.float32]:
        """The raw outputs [N, ...] for an array [N, ...]."""
        return self._run(self._infer(model, array, version, form))

    def benchmark(
        self, model: str, *, batch_sizes: Sequence[int] | None = None, seconds: float | None = None
    ) -> Json:
        """Measure the training form against the deploy form; takes as long as it takes."""
        return self._run(self._benchmark(model, batch_sizes, seconds))

    def set_default(self, model: str, version: int | None) -> Json:
        """Pin the version that serves; None takes the pin away."""
        path = f"/v1/models/{model}/default"
        return self._run(self._json("PUT", path, json={"version": version}))

    def delete(self, model: str, version: int | None = None) -> None:
        """Delete one version, or the whole model."""
        path = f"/v1/models/{model}" + ("" if version is None else f"/versions/{version}")
        self._run(self._delete(path))

    def health(self) -> Json:
        """The state of the service."""
        return self._run(self._json("GET", "/health"))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _items(self, path: str) -> Iterator[Json]:
        following: str | None = path
        while following is not None:
            items, following = self._run(self._page(following))
            yield from items

    def _run(self, steps: _Steps[T]) -> T:
        try:
            need = next(steps)
            while True:
                if isinstance(need, _Pause):
                    time.sleep(need.seconds)
                    need = next(steps)
                else:
                    need = steps.send(self._send(need))
        except StopIteration as stop:
            result: T = stop.value
            return result

    def _send(self, call: _Call) -> httpx.Response:
        for attempt in range(self._retries + 1):
            response = self._http.request(call.method, call.path, **call.options)
            if response.is_success:
                return response
            if response.status_code not in _BUSY or attempt == self._retries:
                break
            time.sleep(_patience(response, attempt))
        raise _error(response)


class AsyncClient(_Operations):
    """The same for asyncio; see `Client`."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._retries = retries
        self._http = httpx.AsyncClient(
            base_url=url, timeout=timeout, transport=transport, headers=_key_header(api_key)
        )

    async def upload(
        self,
        checkpoint: str | Path,
        model: str | None = None,
        *,
        config: Mapping[str, Any] | None = None,
        progress: Transferred | None = None,
        wait: float | None = None,
    ) -> Version:
        """See `Client.upload`."""
        path = Path(checkpoint)
        file = await asyncio.to_thread(path.open, "rb")
        with file:
            name = model or model_name(path)
            return await self._run(self._upload(file, path.name, name, config, progress, wait))

    async def wait(self, version: Version, seconds: float = 600.0) -> Version:
        """See `Client.wait`."""
        return await self._run(self._wait(version, seconds))

    async def version(self, model: str, version: int) -> Version:
        """One version."""
        return await self._run(self._version(model, version))

    async def model(self, model: str) -> Json:
        """One model with its newest versions."""
        return await self._run(self._json("GET", f"/v1/models/{model}"))

    async def models(self) -> AsyncIterator[Json]:
        """Every model, page by page."""
        following: str | None = "/v1/models"
        while following is not None:
            items, following = await self._run(self._page(following))
            for item in items:
                yield item

    async def report(self, model: str, version: int) -> Json:
        """The whole fusion report."""
        return await self._run(self._json("GET", f"/v1/models/{model}/versions/{version}/report"))

    async def predict(
        self,
        model: str,
        given: Input,
        *,
        version: int | None = None,
        form: Form = "deploy",
        top_k: int | None = None,
    ) -> list[list[Label]]:
        """See `Client.predict`."""
        return await self._run(self._predict(model, given, version, form, top_k))

    async def infer(
        self,
        model: str,
        array: NDArray[Any],
        *,
        version: int | None = None,
        form: Form = "deploy",
    ) -> NDArray[np.float32]:
        """See `Client.infer`."""
        return await self._run(self._infer(model, array, version, form))

    async def benchmark(
        self, model: str, *, batch_sizes: Sequence[int] | None = None, seconds: float | None = None
    ) -> Json:
        """See `Client.benchmark`."""
        return await self._run(self._benchmark(model, batch_sizes, seconds))

    async def set_default(self, model: str, version: int | None) -> Json:
        """See `Client.set_default`."""
        path = f"/v1/models/{model}/default"
        return await self._run(self._json("PUT", path, json={"version": version}))

    async def delete(self, model: str, version: int | None = None) -> None:
        """See `Client.delete`."""
        path = f"/v1/models/{model}" + ("" if version is None else f"/versions/{version}")
        await self._run(self._delete(path))

    async def health(self) -> Json:
        """The state of the service."""
        return await self._run(self._json("GET", "/health"))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _run(self, steps: _Steps[T]) -> T:
        try:
            need = next(steps)
            while True:
                if isinstance(need, _Pause):
                    await asyncio.sleep(need.seconds)
                    need = next(steps)
                else:
                    need = steps.send(await self._send(need))
        except StopIteration as stop:
            result: T = stop.value
            return result

    async def _send(self, call: _Call) -> httpx.Response:
        for attempt in range(self._retries + 1):
            response = await self._http.request(call.method, call.path, **call.options)
            if response.is_success:
                return response
            if response.status_code not in _BUSY or attempt == self._retries:
                break
            await asyncio.sleep(_patience(response, attempt))
        raise _error(response)


class _Counted(io.RawIOBase):
    """A file that tells how much of it was read; httpx rewinds it when a request is repeated."""

    def __init__(self, file: BinaryIO, progress: Transferred | None) -> None:
        self._file = file
        self._progress = progress
        self._size = file.seek(0, io.SEEK_END)
        file.seek(0)

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        if self._progress is not None and data:
            self._progress(self._file.tell(), self._size)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


class _EventDecoder:
    """Server-sent events from lines (WHATWG HTML, section 9.2.6)."""

    def __init__(self) -> None:
        self._fields: dict[str, str] = {}

    def line(self, line: str) -> Json | None:
        """The event that this line completes, if any."""
        if not line:
            fields, self._fields = self._fields, {}
            if "data" not in fields:
                return None
            return {
                "id": int(fields.get("id", 0)),
                "event": fields.get("event", "message"),
                "data": json.loads(fields["data"]),
            }
        name, _, value = line.partition(":")
        if name:
            self._fields[name] = value.removeprefix(" ")
        return None


def _patience(response: httpx.Response, attempt: int) -> float:
    """Seconds until the next try: what the service asks for, or doubling from 0.5 with jitter."""
    try:
        return max(0.0, float(response.headers["Retry-After"]))
    except (KeyError, ValueError):
        return min(8.0, 0.5 * 2.0**attempt) * random.uniform(0.75, 1.25)


def _error(response: httpx.Response) -> FoldserveError:
    """The service's own error, from its problem document."""
    try:
        return FoldserveError.from_dict(response.json())
    except (ValueError, AttributeError):  # something in between answered
        return FoldserveError(
            f"{response.request.method} {response.request.url} answered {response.status_code}.",
            status=response.status_code,
        )


def _query(**values: Any) -> Json:
    return {name: value for name, value in values.items() if value is not None}


def _body(given: Input) -> Json:
    """Content and headers for an array, one image, or several."""
    if hasattr(given, "__array_interface__") and hasattr(given, "ndim"):
        import numpy as np

        buffer = io.BytesIO()
        np.save(buffer, np.asarray(given, dtype=np.float32), allow_pickle=False)
        return {"content": buffer.getvalue(), "headers": {"Content-Type": _NPY}}
    if isinstance(given, Sequence) and not isinstance(given, str | bytes):
        parts = []
        for number, one in enumerate(given):
            data = _image_bytes(one)
            parts.append(("image", (f"{number}", data, _image_type(data))))
        return {"files": parts}
    data = _image_bytes(given)
    return {"content": data, "headers": {"Content-Type": _image_type(data)}}


def _image_bytes(picture: Any) -> bytes:
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, str | Path):
        return Path(picture).read_bytes()
    if hasattr(picture, "save") and hasattr(picture, "mode"):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")  # lossless: the service sees the very pixels
        return buffer.getvalue()
    raise BadInput(
        f"{type(picture).__name__} is no input.",
        remedy="Give a path, the bytes of an image file, a PIL image, or a NumPy array.",
    )


def _image_type(data: bytes) -> str:
    return _IMAGES.get(data[:2], "application/octet-stream")
