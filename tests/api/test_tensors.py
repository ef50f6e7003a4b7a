from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.api import tensors
from service.errors import BadInput
from tests.api import tiny

ITEM = (2, 3)
GOOD = np.arange(12, dtype=np.float32).reshape(2, 2, 3)


def forged(header: bytes, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + data


def test_a_float32_array_is_read_without_a_copy() -> None:
    body = bytearray(tiny.npy(GOOD))
    array = tensors.from_npy(body, ITEM)
    assert np.array_equal(array, GOOD)
    body[-4:] = struct.pack("<f", -1.0)
    assert array[-1, -1, -1] == -1.0


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000, 2, 3), }\n",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 2, 3), }\n",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (1, 2, 3), }\n",
        b"{'descr': '<c8', 'fortran_order': False, 'shape': (1, 2, 3), }\n",
        b"{'descr': '<f16', 'fortran_order': False, 'shape': (1, 2, 3), }\n",
        b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1, 2, 3), }\n",
        b"{'descr': '<f4', 'fortran_order': False}\n",
        b"__import__('os').abort()\n",
        b"(" * 2000,
        b"-" * 3000 + b"1",
        b"\xff\xfe",
    ],
)
def test_forged_headers_are_refused(header: bytes) -> None:
    with pytest.raises(BadInput):
        tensors.from_npy(forged(header, bytes(24)), ITEM)


def test_the_forger_can_write_a_good_one() -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2, 3), }\n"
    assert tensors.from_npy(forged(header, bytes(24)), ITEM).shape == (1, 2, 3)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutations_are_read_or_refused(data: st.DataObject) -> None:
    body = bytearray(tiny.npy(GOOD))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        array = tensors.from_npy(body[: data.draw(st.integers(0, len(body)))], ITEM)
    except BadInput:
        return
    assert array.shape[1:] == ITEM
    assert array.dtype == np.float32


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=12,
    )
)
def test_any_json_is_read_or_refused(value: object) -> None:
    import json

    body = json.dumps({"inputs": value}).encode()
    try:
        array = tensors.from_json(body, ITEM)
    except BadInput:
        return
    assert array.shape[1:] == ITEM


def test_huge_numbers_do_not_fail() -> None:
    with pytest.raises(BadInput):
        tensors.from_json(b'{"inputs": [[1e999, 2, 3], [4, 5, 6]]}', ITEM)
    with pytest.raises(BadInput):
        tensors.from_json(b'{"inputs": [[' + b"9" * 400 + b", 2, 3], [4, 5, 6]]}", ITEM)


def test_numbers_beyond_float32_are_refused() -> None:
    with pytest.raises(BadInput, match="range"):
        tensors.from_json(b'{"inputs": [[1e39, 2, 3], [4, 5, 6]]}', ITEM)
    with pytest.raises(BadInput, match="range"):
        tensors.from_npy(tiny.npy(np.full((1, *ITEM), 1e39)), ITEM)
    assert np.isinf(tensors.from_npy(tiny.npy(np.full((1, *ITEM), np.inf)), ITEM)).all()


def test_several_outputs_are_flattened_per_row() -> None:
    first = np.arange(12, dtype=np.float64).reshape(2, 2, 3)
    second = np.array([[7.0], [8.0]])
    joined = tensors.joined([first, second])
    assert joined.dtype == np.float32
    assert np.array_equal(joined, [[0, 1, 2, 3, 4, 5, 7], [6, 7, 8, 9, 10, 11, 8]])
    assert tensors.joined([first]).shape == (2, 2, 3)


def test_what_is_written_numpy_reads() -> None:
    for array in (GOOD, GOOD.transpose(0, 2, 1), GOOD[:0]):
        assert np.array_equal(tiny.from_npy(tensors.to_npy(array)), array)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that `work` held at once beyond what there was."""
    tracemalloc.start()
    try:
        kept = work()
        peak = tracemalloc.get_traced_memory()[1]
        del kept
    finally:
        tracemalloc.stop()
    return peak


def test_binary_bodies_never_become_lists() -> None:
    array = np.random.default_rng(0).normal(size=(8, 3, 64, 64)).astype(np.float32)
    body = tensors.to_npy(array)
    assert peak_bytes(lambda: tensors.from_npy(body, (3, 64, 64))) < 0.1 * array.nbytes
    assert peak_bytes(lambda: tensors.to_npy(array)) < 1.1 * array.nbytes
    # The control: JSON does become lists of numbers, and they are seen.
    text = json.dumps({"inputs": array.tolist()}).encode()
    assert peak_bytes(lambda: tensors.from_json(text, (3, 64, 64))) > 4 * array.nbytes
