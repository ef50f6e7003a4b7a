"""Services with one fault each, for the controls: called in the service before it starts."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from service import worker
from service.graph import Program
from service.serving.backends import torch_cpu


def publish_in_place() -> None:
    """Blobs are written under their final name, piece by piece, as if rename were not there."""

    def copy(source: Any, target: Any) -> None:
        data = Path(source).read_bytes()
        with open(target, "wb", buffering=0) as file:
            file.write(data[: len(data) // 2])
            file.write(data[len(data) // 2 :])
        os.unlink(source)

    os.replace = copy  # type: ignore[assignment]


def die_in_conversion() -> None:
    """A conversion that has begun goes on when the file DIE_IN_CONVERSION is there, and dies."""
    order = Path(os.environ["DIE_IN_CONVERSION"])
    begin = worker.run_sandboxed

    def die(progress: object) -> None:
        while not order.exists():
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGKILL)

    def dying(*args: Any, **kwargs: Any) -> Any:
        return begin(*args, **kwargs | {"on_progress": die})

    worker.run_sandboxed = dying  # type: ignore[attr-defined]


def device() -> None:
    """While the file LOST_DEVICE exists, programs whose largest weight it names cannot run."""
    flag = Path(os.environ["LOST_DEVICE"])
    run, begin = torch_cpu.TorchCpu.run, torch_cpu.TorchCpu.__init__

    def marked(self: Any, program: Program, *args: Any, **kwargs: Any) -> None:
        begin(self, program, *args, **kwargs)
        self.largest = max(float(tensor.max()) for tensor in program.weights.values())

    def failing(self: Any, *args: Any) -> tuple[Tensor, ...]:
        if flag.exists() and float(flag.read_text()) == self.largest:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return run(self, *args)

    torch_cpu.TorchCpu.__init__ = marked  # type: ignore[method-assign]
    torch_cpu.TorchCpu.run = failing  # type: ignore[method-assign]
