"""What OpenAPI says about errors: which problem codes a route may answer with."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from service.api import problems
from service.api.schemas import Problem
from service.errors import FoldserveError

Responses = dict[int | str, dict[str, Any]]


def inlined(model: type[BaseModel]) -> dict[str, Any]:
    """A model's JSON schema without references, which mean nothing inside another document."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolved(value: Any) -> Any:
        if isinstance(value, dict):
            name = str(value.get("$ref", "")).removeprefix("#/$defs/")
            if name in definitions:
                return resolved(definitions[name])
            return {key: resolved(item) for key, item in value.items()}
        return [resolved(item) for item in value] if isinstance(value, list) else value

    whole: dict[str, Any] = resolved(schema)
    return whole


def refusals(*kinds: type[FoldserveError], also: Responses | None = None) -> Responses:
    """`responses` for a route that may raise `kinds`, beside the framework's own refusals.

    `also` are the route's other answers.
    """
    codes: dict[int, list[str]] = {422: ["invalid_request"], 500: ["internal_error"]}
    for kind in kinds:
        codes.setdefault(int(problems.status_of(kind)), []).append(kind.code())
    return dict(also or {}) | {
        status: {
            "description": f"Problem: {', '.join(f'`{name}`' for name in names)}.",
            "model": Problem,
            "content": {problems.MEDIA_TYPE: {"schema": Problem.model_json_schema()}},
        }
        for status, names in sorted(codes.items())
    }
