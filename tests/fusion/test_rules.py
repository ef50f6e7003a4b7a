"""Single rules against running the operators."""

from __future__ import annotations

import pytest

from service.fusion import fuse
from tests.fusion.test_property import deviation
from tests.graph.builder import Builder


@pytest.mark.parametrize(
    ("op", "sizes", "constant"),
    [
        ("mul.Tensor", (3, 4, 4), (3, 1, 1)),
        ("add.Tensor", (3, 4, 4), (3, 4, 4)),
        ("mul.Tensor", (1, 4, 4), (3, 1, 1)),
        ("add.Tensor", (3, 1, 1), (3, 4, 4)),
    ],
)
def test_a_constant_combined_with_data(
    op: str, sizes: tuple[int, ...], constant: tuple[int, ...]
) -> None:
    build = Builder()
    x = build.norm(build.input(*sizes))
    y = build.call(op, self=x, other=build.uniform(1, *constant))
    assert deviation(fuse(build.program(y))) <= 1e-12
