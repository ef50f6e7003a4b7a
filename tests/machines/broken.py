"""Services with one fault each, for the controls: called in the service before it starts."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from service import worker
from service.cli import main
from service.errors import DeviceLost
from service.graph import Program
from service.serving import device as devices
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


def sticky_device() -> None:
    """Once a run finds the file STICKY_ERROR, nothing can be computed in this process any more.

    The file goes with that, so that the next process is well; unless it says `always`.
    """
    flag = Path(os.environ["STICKY_ERROR"])
    message = "CUDA error: device-side assert triggered"
    run, begin = torch_cpu.TorchCpu.run, torch_cpu.TorchCpu.__init__
    lost = False

    def touch() -> None:
        nonlocal lost
        if flag.exists():
            lost = True
            if flag.read_text() != "always":
                flag.unlink()
        if lost:
            raise RuntimeError(message)

    def preparing(self: Any, *args: Any, **kwargs: Any) -> None:
        if lost:
            raise RuntimeError(message)
        begin(self, *args, **kwargs)

    def running(self: Any, *args: Any) -> tuple[Tensor, ...]:
        touch()
        return run(self, *args)

    def find_lost(place: str) -> DeviceLost | None:
        return DeviceLost(f"{place}: {message}", device=place) if lost else None

    torch_cpu.TorchCpu.__init__ = preparing  # type: ignore[method-assign]
    torch_cpu.TorchCpu.run = running  # type: ignore[method-assign]
    devices.find_lost = find_lost


if __name__ == "__main__":  # a whole process, which can exec: FAULT names the fault
    globals()[os.environ["FAULT"]]()
    main()
