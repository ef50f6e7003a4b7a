"""PyTorch as a backend: the reference that every other engine is measured and checked against."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from service.graph import Program
from service.serving.backends.base import Precision, Prepared
from service.serving.backends.choices import Choices
from service.serving.backends.torch_cpu import TorchCpu
from service.serving.backends.torch_cuda import TorchCuda


class TorchBackend:
    """Runs programs with PyTorch on `cpu`, `cuda` or `cuda:N`."""

    name = "torch"

    def __init__(self, choices: Choices | None = None) -> None:
        self._choices = choices or Choices()

    def prepare(
        self,
        program: Program,
        device: str,
        precision: Precision,
        batch_sizes: Sequence[int],
        calibration: tuple[Tensor, ...] | None = None,
    ) -> Prepared:
        """Load `program` onto `device`; no precision here needs `calibration`.

        Raises BackendFailed for a program that cannot be served row by row, an impossible
        precision, or a device that is not there.
        """
        if device.partition(":")[0] == "cuda":
            return TorchCuda(program, device, precision, batch_sizes, self._choices)
        return TorchCpu(program, precision, batch_sizes, self._choices)
