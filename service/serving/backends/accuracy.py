"""Does an engine compute what the program says? Its outputs against PyTorch's in float32.

Differences are relative to how much the output varies between the rows of a probe: an output that
hardly varies proves nothing, however small the difference.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from service.serving.backends.base import Precision, Prepared
from service.serving.backends.rows import random_rows

PROBE_ROWS = 32
STEP_ROWS = 8
TOLERANCES: Mapping[Precision, float] = {
    "float32": 1e-4,
    "tf32": 1e-2,
    "bfloat16": 5e-2,
    "float16": 1e-2,
    "int8": 0.15,
}
"""Largest difference that is certified, in 2-norm over the variation of the output."""

TOP1_AGREEMENT = 0.98
"""Least share of the user's own inputs whose largest class must stay the same."""


@dataclass(frozen=True)
class Accuracy:
    """How well one engine and precision agree with PyTorch's float32 outputs.

    `error` is a 2-norm over the output's variation, the worst of all outputs; `top1_agreement` the
    share of rows whose largest class stays (None where outputs are not class scores). `inputs` are
    `calibration` (the user's own, none of which set a range) or `random`; only on the user's own
    does top-1 agreement decide, because what is noise to the network has no class.
    """

    backend: str
    precision: str
    error: float
    error_limit: float
    top1_agreement: float | None
    top1_limit: float | None
    rows: int
    inputs: str

    @property
    def passed(self) -> bool:
        """Whether this may be served."""
        top1 = self.top1_limit is None or (self.top1_agreement or 0.0) >= self.top1_limit
        return self.error <= self.error_limit and top1

    def sentence(self) -> str:
        """The outcome for people."""
        top1 = (
            "" if self.top1_agreement is None else f" and top-1 agrees on {self.top1_agreement:.1%}"
        )
        limit = "" if self.top1_limit is None else f" and {self.top1_limit:.0%}"
        return (
            f"{self.backend} in {self.precision} differs from float32 by {self.error:.1e} of the "
            f"output's variation{top1} of {self.rows} {self.inputs} rows; the limits are "
            f"{self.error_limit:.0e}{limit}"
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form; an error that is not finite becomes None."""
        error = self.error if math.isfinite(self.error) else None
        return asdict(self) | {"error": error, "passed": self.passed}


def measure_accuracy(
    reference: Prepared,
    candidate: Prepared,
    precision: Precision,
    own: tuple[Tensor, ...] | None = None,
) -> Generator[None, None, Accuracy]:
    """Run both on the same rows, the user's `own` or random ones, a few at a time."""
    inputs = own or random_rows(candidate.inputs, PROBE_ROWS, seed=1)
    step = min(STEP_ROWS, candidate.batch_sizes[-1], reference.batch_sizes[-1])
    parts: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = []
    for start in range(0, len(inputs[0]), step):
        rows = tuple(column[start : start + step] for column in inputs)
        parts.append((reference.run(rows), candidate.run(rows)))
        yield
    truth, answer = (
        [torch.cat(c) for c in zip(*side, strict=True)] for side in zip(*parts, strict=True)
    )
    top1 = top1_agreement(truth[0], answer[0])
    errors = [relative_difference(a, b) for a, b in zip(truth, answer, strict=True)]
    return Accuracy(
        backend=candidate.describe().backend,
        precision=precision,
        error=max(errors) if all(map(math.isfinite, errors)) else math.inf,
        error_limit=TOLERANCES[precision],
        top1_agreement=top1,
        top1_limit=None if own is None or top1 is None else TOP1_AGREEMENT,
        rows=len(inputs[0]),
        inputs="random" if own is None else "calibration",
    )


def relative_difference(truth: Tensor, answer: Tensor) -> float:
    """2-norm of the difference over that of `truth` [N, ...] around its mean row.

    With one row, or an output that does not vary at all, over that of `truth` itself. For integer
    outputs (labels) it is the share that is not equal.
    """
    if not truth.is_floating_point():
        return float((truth != answer).double().mean())
    exact = truth.double()
    error = (answer.double() - exact).norm()
    variation = (exact - exact.mean(0)).norm()
    scale = variation if len(exact) > 1 and variation > 0 else exact.norm()
    return float(error / scale) if error else 0.0


def top1_agreement(truth: Tensor, answer: Tensor) -> float | None:
    """Share of rows with the same largest class; None where there are no scores [N, classes]."""
    if truth.dim() != 2 or truth.shape[1] < 2 or not truth.is_floating_point():
        return None
    return float((truth.argmax(1) == answer.argmax(1)).double().mean())


def worst(found: Sequence[Accuracy]) -> Accuracy:
    """The one with the smallest error of those that failed: how near it came."""
    return min(found, key=lambda accuracy: accuracy.error)
