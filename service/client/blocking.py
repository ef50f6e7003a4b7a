"""The blocking client."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import httpx

from service.client.bodies import EventDecoder
from service.client.operations import (
    BUSY,
    Call,
    Operations,
    Pause,
    Steps,
    error_of,
    key_header,
    model_name,
    patience,
)
from service.client.types import DEFAULT_URL, Form, Format, Json, Label, Transferred, Version

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from service.client.types import Input, Rows

T = TypeVar("T")


class Client(Operations):
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
            base_url=url, timeout=timeout, transport=transport, headers=key_header(api_key)
        )

    def upload(
        self,
        checkpoint: str | Path,
        model: str | None = None,
        *,
        config: Mapping[str, Any] | None = None,
        calibration: Rows | None = None,
        progress: Transferred | None = None,
        wait: float | None = None,
    ) -> Version:
        """Upload a file as the next version of `model` (by default named after the file).

        `calibration` are typical inputs, float32 [N, *input shape], for a `config` that asks for a
        lower precision: an array, or a .npy file or its bytes. With `wait` (seconds) it returns
        when the version is ready and raises why it was rejected.
        """
        path = Path(checkpoint)
        with path.open("rb") as file:
            name = model or model_name(path)
            return self._run(
                self._upload(file, path.name, name, config, calibration, progress, wait)
            )

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
        call = self._events_call(version, after)
        with self._http.stream(call.method, call.path, **call.options) as response:
            if response.is_error:
                response.read()
                raise error_of(response)
            decoder = EventDecoder()
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
                raise error_of(response)
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

    def change(self, model: str, version: int, **changes: Any) -> Version:
        """Change `labels` or `preprocessing` of a version; None takes one back."""
        return self._run(self._change(model, version, changes))

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

    def _run(self, steps: Steps[T]) -> T:
        try:
            need = next(steps)
            while True:
                if isinstance(need, Pause):
                    time.sleep(need.seconds)
                    need = next(steps)
                else:
                    need = steps.send(self._send(need))
        except StopIteration as stop:
            result: T = stop.value
            return result

    def _send(self, call: Call) -> httpx.Response:
        for attempt in range(self._retries + 1):
            response = self._http.request(call.method, call.path, **call.options)
            if response.is_success:
                return response
            if response.status_code not in BUSY or attempt == self._retries:
                break
            time.sleep(patience(response, attempt))
        raise error_of(response)
