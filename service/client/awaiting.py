"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
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


class AsyncClient(Operations):
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
            base_url=url, timeout=timeout, transport=transport, headers=key_header(api_key)
        )

    async def upload(
        self,
        checkpoint: str | Path,
        model: str | None = None,
        *,
        config: Mapping[str, Any] | None = None,
        calibration: Rows | None = None,
        progress: Transferred | None = None,
        wait: float | None = None,
    ) -> Version:
        """See `Client.upload`."""
        path = Path(checkpoint)
        file = await asyncio.to_thread(path.open, "rb")
        with file:
            name = model or model_name(path)
            return await self._run(
                self._upload(file, path.name, name, config, calibration, progress, wait)
            )

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
        async for item in self._items("/v1/models"):
            yield item

    async def versions(self, model: str) -> AsyncIterator[Version]:
        """See `Client.versions`."""
        async for item in self._items(f"/v1/models/{model}/versions"):
            yield Version.of(item)

    async def events(self, version: Version, after: int = 0) -> AsyncIterator[Json]:
        """See `Client.events`."""
        call = self._events_call(version, after)
        async with self._http.stream(call.method, call.path, **call.options) as response:
            if response.is_error:
                await response.aread()
                raise error_of(response)
            decoder = EventDecoder()
            async for line in response.aiter_lines():
                if (event := decoder.line(line)) is not None:
                    yield event

    async def report(self, model: str, version: int) -> Json:
        """The whole fusion report."""
        return await self._run(self._json("GET", f"/v1/models/{model}/versions/{version}/report"))

    async def download(
        self,
        model: str,
        version: int,
        target: str | Path,
        form: Form = "deploy",
        format: Format = "safetensors",
    ) -> Path:
        """See `Client.download`."""
        path = self._download_path(model, version, form, format)
        async with self._http.stream("GET", path) as response:
            if response.is_error:
                await response.aread()
                raise error_of(response)
            with await asyncio.to_thread(Path(target).open, "wb") as file:
                async for chunk in response.aiter_bytes(1 << 20):
                    await asyncio.to_thread(file.write, chunk)
        return Path(target)

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

    async def change(self, model: str, version: int, **changes: Any) -> Version:
        """See `Client.change`."""
        return await self._run(self._change(model, version, changes))

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

    async def _items(self, path: str) -> AsyncIterator[Json]:
        following: str | None = path
        while following is not None:
            items, following = await self._run(self._page(following))
            for item in items:
                yield item

    async def _run(self, steps: Steps[T]) -> T:
        try:
            need = next(steps)
            while True:
                if isinstance(need, Pause):
                    await asyncio.sleep(need.seconds)
                    need = next(steps)
                else:
                    need = steps.send(await self._send(need))
        except StopIteration as stop:
            result: T = stop.value
            return result

    async def _send(self, call: Call) -> httpx.Response:
        for attempt in range(self._retries + 1):
            response = await self._http.request(call.method, call.path, **call.options)
            if response.is_success:
                return response
            if response.status_code not in BUSY or attempt == self._retries:
                break
            await asyncio.sleep(patience(response, attempt))
        raise error_of(response)
