"""That comparing with the official outputs tells a right block from one with a wrong constant."""

from __future__ import annotations

import pytest

from tests.networks import cases


@cases.needs_cases
@pytest.mark.parametrize("name", cases.names(*cases.BLOCKS))
def test_a_wrong_eps_is_seen(name: str) -> None:
    eps = cases.load(name)["attrs"].get("eps")
    if eps is None:
        pytest.skip("the block has no batch norm")
    _, module = cases.built(name, cases.network_of(name), eps=1e-5 if eps == 1e-3 else 1e-3)
    assert cases.error_f64(name, module) > 1e-6
