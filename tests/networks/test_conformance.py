"""That comparing with the official outputs tells a right block from one with a wrong constant."""

from __future__ import annotations

import pytest

from tests.networks import cases

NORMED = [n for n in cases.names(*cases.BLOCKS) if cases.load(n)["attrs"].get("eps") is not None]


@cases.needs_cases
@pytest.mark.parametrize("name", NORMED)
def test_a_wrong_eps_is_seen(name: str) -> None:
    eps = cases.load(name)["attrs"]["eps"]
    _, module = cases.built(name, cases.network_of(name), eps=1e-5 if eps == 1e-3 else 1e-3)
    assert cases.error_f64(name, module) > 1e-6
