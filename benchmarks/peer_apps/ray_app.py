"""Ray Serve with dynamic batching. It gets a network namespace with loopback only."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.workload import Deployed


@serve.deployment(max_ongoing_requests=512, ray_actor_options={"num_cpus": 1})
class Served:
    def __init__(self, folder: str) -> None:
        self.model = Deployed(Path(folder))

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.001)
    async def infer(self, bodies: list[bytes]) -> list[bytes]:
        logits = self.model(np.stack([self.model.row(body) for body in bodies]))
        return [row.tobytes() for row in logits]

    async def __call__(self, request: Request) -> Any:
        answer = await self.infer(await request.body())
        return Response(answer, media_type="application/octet-stream")


def main() -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        num_cpus=max(2, os.cpu_count() or 2),
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        object_store_memory=200 * 2**20,
        log_to_driver=False,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
    serve.run(Served.bind(sys.argv[1]), route_prefix="/predict")  # type: ignore[attr-defined]
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
