"""The bound: what OpenVINO's throughput mode reaches on the fused network without any server.

    python -m benchmarks.bound FOLDER      prints `ready ...`; each line `SECONDS` answers a result

One process, as many streams as OpenVINO chooses for the CPUs, several batches in flight at once,
inputs that lie in memory already. Batches of 1 and 8 rows are tried; the better one counts.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workload import Deployed
from service.graph import trace
from service.serving.backends.openvino_backend import _converted, _openvino

BATCHES = (1, 8)


def main() -> None:
    """Serve measurements on standard input and output."""
    import torch

    deployed = Deployed(Path(sys.argv[1]))
    shape = deployed.network.shape
    openvino = _openvino()
    settings = {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "INFERENCE_PRECISION_HINT": openvino.Type.f32,
    }
    model = _converted(trace(deployed.module, (torch.zeros(1, *shape),)))
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    streams = compiled.get_property("NUM_STREAMS")
    queues = {batch: openvino.AsyncInferQueue(compiled) for batch in BATCHES}
    for batch, queue in queues.items():
        _rate(queue, batch, shape, 0.2)
    print(f"ready {streams} streams", flush=True)
    for line in sys.stdin:
        seconds = float(line) / len(BATCHES)
        rates = {str(batch): _rate(queue, batch, shape, seconds) for batch, queue in queues.items()}
        print(json.dumps(rates), flush=True)


def _rate(queue: Any, batch: int, shape: tuple[int, ...], seconds: float) -> float:
    """Rows a second."""
    rows = np.random.default_rng(0).normal(size=(batch, *shape)).astype(np.float32)
    count = 0
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        queue.start_async([rows], share_inputs=True)
        count += 1
    queue.wait_all()
    return count * batch / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
