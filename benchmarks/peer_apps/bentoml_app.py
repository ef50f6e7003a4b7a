"""BentoML with adaptive batching. A batchable method takes JSON, so a row travels in base64.

It reads annotations as they are, so they are not postponed here.
"""

import base64
import os
import sys
from pathlib import Path

import bentoml
import numpy as np

from benchmarks.workload import Deployed


@bentoml.service(workers=1, traffic={"timeout": 120, "max_concurrency": 1024})
class Bento:
    def __init__(self) -> None:
        self.model = Deployed(Path(os.environ["BENCHMARK_FOLDER"]))

    @bentoml.api(batchable=True, max_batch_size=32, max_latency_ms=60_000)
    def encoded(self, rows: list[str]) -> np.ndarray:
        return self.model(np.stack([self.model.row(base64.b64decode(row)) for row in rows]))

    @bentoml.api(batchable=True, max_batch_size=32, max_latency_ms=60_000)
    def arrays(self, rows: np.ndarray) -> np.ndarray:
        return self.model(np.asarray(rows, np.float32))


def main() -> None:
    os.environ["BENCHMARK_FOLDER"] = sys.argv[1]
    command = [sys.executable, "-m", "bentoml", "serve", "benchmarks.peer_apps.bentoml_app:Bento"]
    os.execv(sys.executable, [*command, "--host", "127.0.0.1", "--port", sys.argv[2]])


if __name__ == "__main__":
    main()
