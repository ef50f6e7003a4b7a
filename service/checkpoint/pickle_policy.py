"""Which globals the pickle of a checkpoint may name, and what each may be used for.

Far fewer than torch's own list for weights_only: that one holds functions which allocate what
their arguments say (bytearray, torch.Tensor), run slowly (codecs) or make tensors other than
plain dense ones.
"""

from __future__ import annotations

STORAGE_ITEM_BYTES = {
    f"torch.{prefix}{name}Storage": size
    for prefix in ("", "cuda.")
    for name, size in {
        "Double": 8,
        "Float": 4,
        "Half": 2,
        "BFloat16": 2,
        "Long": 8,
        "Int": 4,
        "Short": 2,
        "Char": 1,
        "Byte": 1,
        "Bool": 1,
        "ComplexDouble": 16,
        "ComplexFloat": 8,
    }.items()
} | {"torch.storage.UntypedStorage": 1}
"""Bytes of one element of each storage type that is read; quantised and sparse ones are not."""

OPAQUE = frozenset(
    {
        "numpy.dtype",
        "numpy.ndarray",
        *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
        *(f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")),
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "pathlib.WindowsPath",
        "pathlib.PureWindowsPath",
        "datetime.datetime",
        "builtins.list",
        "builtins.dict",
        "builtins.int",
        "builtins.float",
    }
)
"""Metadata that training scripts save beside the weights: read as an inert nothing."""

OPAQUE_MAPPINGS = frozenset(
    {
        "argparse.Namespace",
        "collections.defaultdict",
        "easydict.EasyDict",
        "yacs.config.CfgNode",
    }
)
"""The same for things that hold keys: read as an empty-handed mapping."""

ORDERED_DICT = "collections.OrderedDict"

TENSOR_MAKERS = {"torch._utils._rebuild_tensor_v2": (6, 7), "torch._utils._rebuild_tensor": (4, 4)}
"""The functions that make tensors, with the fewest and the most arguments."""

CALLABLE = OPAQUE | OPAQUE_MAPPINGS | {ORDERED_DICT, "torch.Size", "torch.device", "builtins.set"}
"""What may be called with any arguments: it allocates no more than they hold."""

_DTYPES = frozenset(
    f"torch.{name}"
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool"),
        *("uint8", "int8", "int16", "int32", "int64", "float8_e4m3fn", "float8_e5m2"),
    )
)
ALLOWED = (
    CALLABLE
    | _DTYPES
    | set(STORAGE_ITEM_BYTES)
    | set(TENSOR_MAKERS)
    | {"torch._utils._rebuild_parameter", "_codecs.encode"}
)
"""Every global that a pickle may name; all others are refused by name."""
