"""Forged export archives: refused by name, or read without any effect.

Where torch's own loader falls for a trick, a control shows that: there the canary appears.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
import random
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from service.errors import (
    ArchiveBomb,
    CheckpointError,
    DuplicateKey,
    FoldserveError,
    GraphError,
    InvalidProgram,
    LimitExceeded,
    NotACheckpoint,
    TensorOutOfRange,
    TruncatedFile,
    UnsupportedContainer,
    UnsupportedOperator,
)
from service.graph import run

from . import archives
from .archives import Entries, pickled, read, with_graph, with_table, written

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"
)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.relu_(self.b(self.c(x))).chunk(2, 1)
        return torch.cat([b, a], 1) + torch.tensor(1.0)


class Canary:
    """Pickles as a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Entries:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    return archives.entries_of(archives.saved(archives.exported(Small(), IMAGE), path))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.pt2"


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def graph_of(document: Any) -> Any:
    return document["graph_module"]["graph"]


def node_of(document: Any, target: str) -> Any:
    return next(node for node in graph_of(document)["nodes"] if target in node["target"])


def load_as_torch_does(path: Path) -> None:
    """torch.export.load and one call of what it gives; every error is part of the experiment."""
    before, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            torch.export.load(path).module()(IMAGE)
    finally:
        logging.raiseExceptions = before


def test_the_forge_makes_what_torch_makes(path: Path, honest: Entries) -> None:
    torch.manual_seed(0)
    (got,) = run(read(written(path, honest)), IMAGE)
    with torch.no_grad():
        assert torch.equal(got, Small().eval()(IMAGE))


# Tricks that run code in torch.export.load -------------------------------------------------------


def _pickled_weight(entries: Entries, canary: Path) -> Entries:
    forged = with_table(entries, "weights", lambda t: t["c.weight"].update(use_pickle=True))
    return {**forged, "data/weights/weight_0": pickled(Canary(canary))}


def _pickled_constant(entries: Entries, canary: Path) -> Entries:
    forged = with_table(
        entries, "constants", lambda t: t["lifted_tensor_0"].update(use_pickle=True)
    )
    return {**forged, "data/constants/tensor_0": pickled(Canary(canary))}


def _opaque_constant(entries: Entries, canary: Path) -> Entries:
    payload = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True}
    forged = with_table(
        entries, "constants", lambda t: t.update(o={**payload, "tensor_meta": None})
    )
    return {**forged, "data/constants/opaque_obj_0": pickle.dumps(Canary(canary))}


def _legacy_weights(entries: Entries, canary: Path) -> Entries:
    return {**entries, "data/weights/model.pt": pickled(Canary(canary))}


def _legacy_constants(entries: Entries, canary: Path) -> Entries:
    return {**entries, "data/constants/model.pt": pickled(Canary(canary))}


def _code(canary: Path) -> str:
    return f"__import__('pathlib').Path({str(canary)!r}).touch()"


def _size_expression(entries: Entries, canary: Path) -> Entries:
    def change(document: Any) -> None:
        size = graph_of(document)["tensor_values"]["conv2d"]["sizes"][0]
        size["as_expr"]["expr_str"] = _code(canary)

    return with_graph(entries, change)


REFUSED_CODE: list[tuple[Callable[[Entries, Path], Entries], str]] = [
    (_pickled_weight, r"'c\.weight' is stored as a pickle"),
    (_pickled_constant, "'lifted_tensor_0' is stored as a pickle"),
    (_opaque_constant, "data/constants/opaque_obj_0"),
    (_legacy_weights, r"data/weights/model\.pt"),
    (_legacy_constants, r"data/constants/model\.pt"),
    (_size_expression, "has the size .*import"),
]


@pytest.mark.parametrize(("forge", "says"), REFUSED_CODE)
def test_what_torch_would_run_is_refused(
    path: Path,
    canary: Path,
    honest: Entries,
    forge: Callable[[Entries, Path], Entries],
    says: str,
) -> None:
    written(path, forge(honest, canary))
    with pytest.raises(InvalidProgram, match=says):
        read(path)
    assert not canary.exists()
    load_as_torch_does(path)
    assert canary.exists(), "the control: torch.export.load falls for it"


def _sample_inputs(entries: Entries, canary: Path) -> Entries:
    return {**entries, "data/sample_inputs/model.pt": pickled(Canary(canary))}


def _guards(entries: Entries, canary: Path) -> Entries:
    return with_graph(entries, lambda d: d.update(guards_code=[_code(canary)]))


@pytest.mark.parametrize("forge", [_sample_inputs, _guards])
def test_what_torch_would_run_and_nobody_needs_is_never_opened(
    path: Path, canary: Path, honest: Entries, forge: Callable[[Entries, Path], Entries]
) -> None:
    written(path, honest)
    (wanted,) = run(read(path), IMAGE)
    written(path, forge(honest, canary))
    assert torch.equal(run(read(path), IMAGE)[0], wanted)
    assert not canary.exists()
    load_as_torch_does(path)
    assert canary.exists(), "the control: torch.export.load falls for it"


class Unused(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + 1


def test_names_that_torch_pastes_into_code_are_keys_here(path: Path, canary: Path) -> None:
    honest = archives.entries_of(archives.saved(archives.exported(Unused(), IMAGE, IMAGE), path))
    written(path, archives.renamed(honest, "y", f"y={_code(canary)}"))
    assert torch.equal(run(read(path), IMAGE, IMAGE)[0], IMAGE + 1)
    assert not canary.exists()
    load_as_torch_does(path)
    assert canary.exists(), "the control: torch.export.load falls for it"


# Targets and names -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "torch.os.system",
        "os.system",
        "builtins.eval",
        "_operator.attrgetter",
        "torch.ops.aten.__class__.default",
        "torch.ops.aten.relu.__call__",
        "torch.ops.aten.relu.default\n",
        "torch.ops.aten.relu",
        "torch.ops.higher_order.cond",
        "torch.ops.prims.iota.default",
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.rand.default",
        "aten.relu",
        "getitem",
        "math.mul",
    ],
)
def test_only_listed_targets_are_known(
    path: Path, honest: Entries, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)

    def change(document: Any) -> None:
        node = node_of(document, "conv2d")
        node["target"] = target
        command = {"name": "command", "arg": {"as_string": "touch canary"}, "kind": 1}
        node["inputs"] = [command]

    with pytest.raises(GraphError) as raised:
        read(written(path, with_graph(honest, change)))
    assert isinstance(raised.value, UnsupportedOperator)
    assert raised.value.extra["operator"] == target
    assert not (path.parent / "canary").exists()


NASTY = ("x\n    import os\n", "x'+__import__('os').getcwd()+'", 'x"', "a=1; b", "x\0y", "\u202ex")


@pytest.mark.parametrize("name", NASTY)
def test_names_of_values_are_keys_and_nothing_else(path: Path, honest: Entries, name: str) -> None:
    (wanted,) = run(read(written(path, honest)), IMAGE)
    for old in ("x", "conv2d", "getitem", "p_c_weight"):
        program = read(written(path, archives.renamed(honest, old, name)))
        assert torch.equal(run(program, IMAGE)[0], wanted)
        mine = {node.name for node in program.nodes} | set(program.weights)
        assert all(key.replace("_", "").replace(".", "").isalnum() for key in mine)


@pytest.mark.parametrize("name", [*NASTY, "../up", "a/b", "", "w" * 300, "\u0430"])
def test_names_of_weights_are_plain(path: Path, honest: Entries, name: str) -> None:
    with pytest.raises(InvalidProgram, match="not a name that a weight may have"):
        read(written(path, archives.renamed(honest, "c.weight", name)))


def test_module_paths_are_plain_or_dropped(path: Path, honest: Entries) -> None:
    def change(document: Any) -> None:
        stack = "L__self__,,Small;L__self__c,{},torch.nn.Conv2d"
        node_of(document, "conv2d")["metadata"]["nn_module_stack"] = stack.format("c\n<script>")
        node_of(document, "batch_norm")["metadata"]["nn_module_stack"] = stack.format("stem.b")

    program = read(written(path, with_graph(honest, change)))
    assert {node.op: node.source for node in program.nodes}["aten.conv2d"] == ""
    assert {node.op: node.source for node in program.nodes}["aten.batch_norm"] == "stem.b"


# The zip -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "data/aotinductor/model/model.so",
        "data/aotinductor/model/model.cpp",
        "data/constants/custom_obj_0",
        "data/weights/weight_x",
        "models/other.json",
        "extra/notes.txt",
        "data.pkl",
        "executorch/model.pte",
        "data/weights/weight_0.so",
    ],
)
def test_unknown_entries_are_refused_by_name(path: Path, honest: Entries, name: str) -> None:
    with pytest.raises(InvalidProgram) as raised:
        read(written(path, {**honest, name: b"\x7fELF"}))
    assert raised.value.extra["entry"] == name


@pytest.mark.parametrize("name", ["models/model.json", "archive_version", "byteorder"])
def test_missing_entries_are_named(path: Path, honest: Entries, name: str) -> None:
    entries = {key: data for key, data in honest.items() if key != name}
    with pytest.raises(InvalidProgram, match=name):
        read(written(path, entries))


@pytest.mark.parametrize(
    ("entry", "data"), [("byteorder", b"big"), ("archive_version", b"9"), ("archive_format", b"x")]
)
def test_other_versions_are_refused(path: Path, honest: Entries, entry: str, data: bytes) -> None:
    with pytest.raises(InvalidProgram, match=entry):
        read(written(path, {**honest, entry: data}))


def test_a_deflated_bomb_is_refused_before_it_grows(path: Path, honest: Entries) -> None:
    bomb = {**honest, "data/weights/weight_0": bytes(64 << 20)}
    written(path, bomb, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(CheckpointError) as raised:
        read(path)
    assert type(raised.value) is ArchiveBomb
    written(path, {k: v for k, v in honest.items() if k != "archive_version"})
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("net/archive_version", "0")
    with pytest.raises(UnsupportedContainer, match="compressed"):
        read(path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("net/models/model.json", NotACheckpoint),
        ("net/../../etc/passwd", NotACheckpoint),
        ("/net/models/x", NotACheckpoint),
        ("net/data\\x", NotACheckpoint),
        ("other/models/model.json", NotACheckpoint),
    ],
)
def test_duplicates_and_path_tricks_are_refused(
    path: Path, honest: Entries, name: str, kind: type[CheckpointError]
) -> None:
    written(path, honest)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(name, honest["models/model.json"])
    with pytest.raises(kind):
        read(path)


def test_every_cut_is_refused(path: Path, honest: Entries) -> None:
    data = written(path, honest).read_bytes()
    for end in range(30, len(data), 2003):
        path.write_bytes(data[:end])
        with pytest.raises((TruncatedFile, NotACheckpoint)):
            read(path)


# Tensors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"storage_offset": {"as_int": 1}}, TensorOutOfRange, "reaches to byte 436 of .* 432"),
        ({"storage_offset": {"as_int": -1}}, InvalidProgram, "plain number"),
        ({"storage_offset": {"as_int": True}}, InvalidProgram, "plain number"),
        ({"dtype": 8}, TensorOutOfRange, "reaches"),
        ({"dtype": 10}, InvalidProgram, "element type"),
        ({"dtype": 99}, InvalidProgram, "element type"),
        ({"layout": 1}, InvalidProgram, "not dense"),
        ({"strides": [{"as_int": 1 << 39}] * 4}, TensorOutOfRange, "reaches"),
        ({"strides": [{"as_int": 1}] * 3}, InvalidProgram, "4 sizes but 3 strides"),
        ({"strides": [{"as_int": -1}] * 4}, InvalidProgram, "plain number"),
        ({"strides": [{"as_expr": {"expr_str": "27"}}] * 4}, InvalidProgram, "plain number"),
        ({"sizes": [{"as_expr": {"expr_str": "Symbol('s77')"}}] * 4}, InvalidProgram, "plain num"),
        ({"sizes": [{"as_int": 1}] * 9}, InvalidProgram, "9 axes"),
        (
            {"sizes": [{"as_int": 100_000}] * 2, "strides": [{"as_int": 0}] * 2},
            LimitExceeded,
            "tensor_expansion",
        ),
        ({"sizes": [{"as_int": 4}], "strides": [{"as_int": 1}]}, InvalidProgram, "is said to be"),
    ],
)
def test_tensors_stay_within_their_bytes(
    path: Path, honest: Entries, change: dict[str, Any], kind: type[FoldserveError], says: str
) -> None:
    forged = with_table(honest, "weights", lambda t: t["c.weight"]["tensor_meta"].update(change))
    with pytest.raises(kind, match=says):
        read(written(path, forged))


@pytest.mark.parametrize(
    "record", ["weight_99", "../../models/model.json", "model_weights_config.json", 3, None]
)
def test_tensors_name_records(path: Path, honest: Entries, record: Any) -> None:
    forged = with_table(honest, "weights", lambda t: t["c.weight"].update(path_name=record))
    with pytest.raises(InvalidProgram, match="no tensor record"):
        read(written(path, forged))


# The graph ---------------------------------------------------------------------------------------


def _argument(target: str, name: str, value: Any) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        inputs = node_of(document, target)["inputs"]
        next(item for item in inputs if item["name"] == name)["arg"] = value

    return change


def _size(name: str, text: str) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        size = graph_of(document)["tensor_values"][name]["sizes"]
        size[0] = {"as_expr": {"expr_str": text, "hint": None}}

    return change


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        (_size("x", "Symbol('s1', positive=True, integer=True)"), InvalidProgram, "another dynam"),
        (_size("conv2d", "Add(Integer(1), Symbol('s77'))"), InvalidProgram, "has the size"),
        (_size("conv2d", "Mul(Integer(2), Symbol('s77'))"), InvalidProgram, "said to be"),
        (_size("conv2d", "Mul(Integer(1), Symbol('s77')"), InvalidProgram, "has the size"),
        (_argument("conv2d", "stride", {"as_ints": [0, 0]}), InvalidProgram, "does not fit"),
        (_argument("conv2d", "stride", {"as_ints": [2, 2]}), InvalidProgram, "is said to be"),
        (_argument("conv2d", "bias", {"as_graph": {}}), InvalidProgram, "'as_graph'"),
        (_argument("conv2d", "bias", {"as_custom_obj": {}}), InvalidProgram, "'as_custom_obj'"),
        (_argument("conv2d", "bias", {"as_operator": "os.system"}), InvalidProgram, "as_operator"),
        (_argument("conv2d", "bias", {"as_tensor": {"name": "nobody"}}), InvalidProgram, "nobody"),
        (_argument("conv2d", "bias", {"as_none": True, "as_int": 1}), InvalidProgram, "one kind"),
        (_argument("conv2d", "stride", {"as_ints": [1 << 70]}), InvalidProgram, "claims to be"),
        (_argument("batch_norm", "eps", {"as_string": "1e-5"}), InvalidProgram, "does not fit"),
        (_argument("batch_norm", "training", {"as_bool": True}), InvalidProgram, "in training"),
        (_argument("chunk", "chunks", {"as_int": 10**9}), InvalidProgram, "every part"),
        (_argument("chunk", "chunks", {"as_int": 0}), InvalidProgram, "number of parts"),
        (_argument("chunk", "dim", {"as_int": 0}), InvalidProgram, "batch axis is split"),
        (_argument("chunk", "dim", {"as_int": 9}), InvalidProgram, "batch axis is split"),
        (lambda d: d["schema_version"].update(major=9), InvalidProgram, "schema 9"),
        (lambda d: d["range_constraints"].update(s1={}), InvalidProgram, "2 dynamic sizes"),
        (
            lambda d: d.update(range_constraints={"__import__('os')": {}}),
            InvalidProgram,
            "not two plain numbers",
        ),
        (
            lambda d: d["range_constraints"]["s77"].update(max_val="os.getcwd()"),
            InvalidProgram,
            "not two plain numbers",
        ),
        (
            lambda d: graph_of(d)["nodes"].extend(copy.deepcopy(graph_of(d)["nodes"])),
            GraphError,
            "twice|in-place",
        ),
        (lambda d: graph_of(d).update(nodes={}), InvalidProgram, "lacks a list"),
        (lambda d: graph_of(d)["nodes"].reverse(), InvalidProgram, "read but not computed"),
        (
            lambda d: d["graph_module"]["signature"]["output_specs"].append(
                {"buffer_mutation": {"arg": {"name": "relu_"}, "buffer_name": "b.running_mean"}}
            ),
            InvalidProgram,
            "buffer_mutation",
        ),
        (
            lambda d: d["graph_module"]["signature"]["input_specs"].append(
                {"custom_obj": {"arg": {"name": "o", "class_fqn": "os"}, "custom_obj_name": "o"}}
            ),
            InvalidProgram,
            "custom_obj",
        ),
    ],
)
def test_graphs_say_what_they_compute(
    path: Path,
    honest: Entries,
    change: Callable[[Any], Any],
    kind: type[FoldserveError],
    says: str,
) -> None:
    with pytest.raises(kind, match=says) as raised:
        read(written(path, with_graph(honest, change)))
    assert raised.value.remedy


def _call(target: str, output: Any, **arguments: Any) -> Callable[[Any], None]:
    """Put one more call in front of the graph."""

    def change(document: Any) -> None:
        inputs = [{"name": key, "arg": value, "kind": 1} for key, value in arguments.items()]
        node = {"target": target, "inputs": inputs, "outputs": [output], "metadata": {}}
        graph_of(document)["nodes"].insert(0, node)

    return change


SYMBOL = {"as_sym_int": {"as_name": "n"}}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            _call("_operator.mul", SYMBOL, a={"as_string": "a" * 64}, b={"as_int": 1 << 40}),
            "two integers",
        ),
        (_call("_operator.mul", SYMBOL, a={"as_int": 1 << 61}, b={"as_int": 1 << 61}), "beyond"),
        (_call("_operator.mul", SYMBOL, a={"as_ints": [1]}, b={"as_int": 1 << 40}), "two integers"),
        (_call("_operator.floordiv", SYMBOL, a={"as_int": 1}, b={"as_int": 0}), "zero"),
        (_call("_operator.add", SYMBOL, a={"as_int": 1}), "'b'"),
        (
            _call("torch.ops.aten.zeros.default", SYMBOL, size={"as_ints": [1 << 39]}),
            "graph_value_bytes|graph_constant_bytes",
        ),
        (
            _call("torch.ops.aten.ones.default", SYMBOL, size={"as_ints": [1 << 26]}),
            "graph_constant_bytes",
        ),
        (
            _call(
                "torch.ops.aten.arange.start_step",
                SYMBOL,
                start={"as_int": 0},
                end={"as_float": 1.0},
                step={"as_float": 1e-12},
            ),
            "graph_value_bytes",
        ),
        (
            _call(
                "torch.ops.aten.repeat.default",
                SYMBOL,
                self={"as_tensor": {"name": "x"}},
                repeats={"as_ints": [1, 1 << 20, 1 << 10, 1]},
            ),
            "graph_value_bytes",
        ),
        (
            _call(
                "torch.ops.aten.unbind.int",
                {"as_tensors": [{"name": "u"}]},
                self={"as_tensor": {"name": "x"}},
                dim={"as_int": 1},
            ),
            "every part",
        ),
        (_call("torch.ops.aten.relu.default", SYMBOL), "without its argument 'self'"),
        (
            _call("torch.ops.aten.relu.default", SYMBOL, self={"as_none": True}, x={"as_int": 1}),
            "no argument 'x'",
        ),
        (_call("torch.ops.aten.relu_.default", SYMBOL, self={"as_none": True}), "what it changes"),
    ],
)
def test_calls_cannot_ask_for_memory_or_more(
    path: Path, honest: Entries, change: Callable[[Any], Any], says: str
) -> None:
    with pytest.raises((InvalidProgram, LimitExceeded), match=says):
        read(written(path, with_graph(honest, change)))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "not an object"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": 1, "a": 2}', "stands twice"),
        (b'{"a": "' + b"\xff" + b'"}', "not valid JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
        (b"{},[" * 500_000, "graph_values"),
    ],
)
def test_documents_are_strict_json(path: Path, honest: Entries, data: bytes, says: str) -> None:
    for entry in ("models/model.json", "data/weights/model_weights_config.json"):
        with pytest.raises((InvalidProgram, LimitExceeded, DuplicateKey), match=says):
            read(written(path, {**honest, entry: data}))


def test_random_damage_is_refused_or_harmless(path: Path, honest: Entries) -> None:
    """Every mutation of the documents ends in a program or in one of our own errors."""
    random_ = random.Random(0)
    values: list[Any] = [
        *(None, True, -1, 0, 3, 1 << 70, 1.5, "", "x", "conv2d", [], {}, [[]]),
        *({"as_int": -5}, {"as_none": True}, {"as_tensor": {"name": "x"}}, {"name": "c_weight"}),
    ]

    def mutate(value: Any) -> None:
        while True:
            keys = list(value) if isinstance(value, dict) else range(len(value))
            key = random_.choice(list(keys))
            inner = value[key]
            if isinstance(inner, (dict, list)) and inner and random_.random() < 0.9:
                value = inner
                continue
            if random_.random() < 0.2:
                del value[key]
            else:
                value[key] = copy.deepcopy(random_.choice(values))
            return

    refused = 0
    for round_ in range(300):
        if round_ % 3:
            entries = with_graph(honest, mutate)
        else:
            entries = with_table(honest, random_.choice(["weights", "constants"]), mutate)
        try:
            read(written(path, entries))
        except FoldserveError:
            refused += 1
    assert 50 < refused < 300
