"""What an inference request asks for, whichever transport brought it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from service.api.inference import compute
from service.api.state import Service
from service.api.v2.messages import (
    InferAnswer,
    InferRequest,
    Parameter,
    check_wishes,
    to_answer,
    to_rows,
)
from service.errors import BadInput
from service.hosting import Hosted
from service.serving import Form, Timing

_FORMS: Final[Mapping[Parameter, Form]] = {"deploy": "deploy", "train": "train"}


async def infer(
    service: Service, on: Hosted, version: int | None, request: InferRequest
) -> InferAnswer:
    """The answer of the version `on`, which was found for the `version` that was asked for.

    Raises BadInput for a request that does not fit the model, and what predictions raise.
    """
    check_wishes(request, on.outputs)
    form = _FORMS.get(request.parameters.get("form", "deploy"))
    if form is None:
        raise BadInput("The parameter `form` is neither deploy nor train.")
    rows = to_rows(request, on.inputs)
    on, result = await compute(service, on, version, rows, form)
    return to_answer(
        request,
        on.model,
        on.version,
        on.outputs,
        result.outputs,
        on.labels,
        _timing(result.timing) if request.timing else None,
    )


def _timing(timing: Timing) -> dict[str, Parameter]:
    return {
        "queue_ms": round(timing.queue_seconds * 1e3, 3),
        "compute_ms": round(timing.compute_seconds * 1e3, 3),
        "batch_rows": timing.batch_rows,
    }
