"""Programs from torch.export archives are equal to the module, in the forms that tracing gives."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service import pipeline
from service.errors import (
    InvalidConfig,
    InvalidProgram,
    LimitExceeded,
    NegativeVariance,
    UnsupportedOperator,
)
from service.graph import (
    Program,
    Pt2Limits,
    Ref,
    from_exported,
    load_program,
    run,
    save_program,
    trace,
)
from service.networks import ModelConfig

from . import archives, steps
from .archives import Form, exported, read, saved

pytestmark = pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"
)
FORMS: tuple[Form, ...] = ("training", "functional", "core")


def randomised(module: nn.Module) -> nn.Module:
    """`module` with batch-norm statistics that matter."""
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            for tensor in (part.running_mean, part.running_var, part.weight, part.bias):
                assert tensor is not None
                tensor.data.uniform_(0.5, 1.5, generator=generator)
    return module.eval()


class Residual(nn.Module):
    """In-place activations and sums, a split, a shuffle, dropout, casts, constants."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.2, inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(8, 5)
        self.register_buffer("scale", torch.full((8, 1, 1), 1.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn(self.conv(x)))
        y += self.conv(x)
        a, b, c = y.split([2, 4, 2], 1)
        d, e = b.chunk(2, 1)
        y = torch.cat([c, e, a, d], 1) * self.scale
        n = x.shape[0]
        y = y.view(n, 2, 4, 8, 8).transpose(1, 2).reshape(n * 2, 4, 8, 8).reshape(n, 8, 8, 8)
        y = self.pool(self.drop(y.to(torch.float64).float().to("cpu")))
        y = F.hardswish(y, inplace=True).mean((2, 3)).flatten(1)
        return self.head(y) + torch.arange(5) + torch.zeros(n, 5) - torch.tensor(2.0)


class Gated(nn.Module):
    """A channels-last weight, a gate from pooled values, GELU, padding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, stride=2).to(memory_format=torch.channels_last)
        self.bn = nn.BatchNorm2d(16)
        self.gate = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.bn(self.conv(F.pad(x, (1, 1, 1, 1)))))
        return y * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(y, 1)))


class Attention(nn.Module):
    """Tokens, a layer norm, an attention and a transposed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, stride=2)
        self.qkv = nn.Linear(16, 48)
        self.norm = nn.LayerNorm(16)
        self.proj = nn.Parameter(torch.randn(16, 16).t())

    def forward(self, x: Tensor) -> Tensor:
        t = self.norm(self.conv(x).flatten(2).transpose(1, 2))
        q, k, v = self.qkv(t).reshape(t.shape[0], t.shape[1], 3, 16).unbind(2)
        t = t + F.scaled_dot_product_attention(q, k, v) @ self.proj
        return t.permute(0, 2, 1).contiguous()


class Audio(nn.Module):
    """One axis; two inputs; two outputs; tied weights; a buffer that repeats itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(2, 4, 3, padding=1)
        self.b = nn.Conv1d(2, 4, 3, padding=1)
        self.b.weight = self.a.weight
        self.bn = nn.BatchNorm1d(4)
        self.register_buffer("table", torch.arange(16.0)[4:8].expand(3, 4))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = self.bn(self.a(x)) + self.b(y)
        return z.relu(), z.mean(2) + self.table.sum(0)


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "residual": (Residual, (IMAGE,)),
    "gated": (Gated, (IMAGE,)),
    "attention": (Attention, (IMAGE,)),
    "audio": (Audio, (torch.randn(2, 2, 9), torch.randn(2, 2, 9))),
    "volume": (
        lambda: nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2), nn.ReLU6(inplace=True)),
        (torch.randn(2, 1, 5, 6, 7),),
    ),
}


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    make, example = NETWORKS[request.param]
    return randomised(make()), example


def compute(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        result = module(*(tensor.clone() for tensor in inputs))
    return result if isinstance(result, tuple) else (result,)


def forms(program: Program) -> list[tuple[Any, ...]]:
    """What every node is, with values numbered in order instead of named."""
    numbers = {spec.name: str(number) for number, spec in enumerate(program.inputs)}
    numbers |= {name: name for name in program.weights if not name.startswith("constant_")}
    listed = []
    for node in program.nodes:
        for name in (*node.refs(), node.name):
            numbers.setdefault(name, f"value {len(numbers)}")
        args = node.renamed(numbers).args
        listed.append((node.op, args, node.shape, node.dtype, node.source))
    return listed


@pytest.mark.parametrize("form", FORMS)
def test_the_program_computes_what_the_module_does(
    tmp_path: Path, network: tuple[nn.Module, tuple[Tensor, ...]], form: Form
) -> None:
    module, example = network
    path = saved(exported(module, *example, form=form), tmp_path / "net.pt2")
    if form == "core" and isinstance(module, Attention):  # torch spells it with `any` there
        with pytest.raises(UnsupportedOperator, match=r"aten\.any"):
            read(path)
        return
    program = read(path)
    for batch in (1, 2, 7):
        inputs = tuple(tensor[:1].repeat(batch, *[1] * (tensor.dim() - 1)) for tensor in example)
        inputs = tuple(tensor + torch.randn_like(tensor) for tensor in inputs)
        for got, wanted in zip(run(program, *inputs), compute(module, inputs), strict=True):
            assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-6)
    save_program(program, tmp_path / "net.bundle")
    assert forms(load_program(tmp_path / "net.bundle")) == forms(program)


def test_another_weight_is_another_result(tmp_path: Path) -> None:
    module = randomised(Residual())
    other = copy.deepcopy(module)
    other.get_parameter("bn.weight").data[3] += 0.1
    (got,) = run(read(saved(exported(other, IMAGE), tmp_path / "net.pt2")), IMAGE)
    assert not torch.allclose(got, compute(module, (IMAGE,))[0], rtol=1e-3)
    assert torch.allclose(got, compute(other, (IMAGE,))[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["training", "functional"])
def test_archives_give_the_forms_of_translating_the_export(
    tmp_path: Path, network: tuple[nn.Module, tuple[Tensor, ...]], form: Form
) -> None:
    module, example = network
    program = exported(module, *example, form=form)
    path = saved(program, tmp_path / "net.pt2")
    assert forms(read(path)) == forms(from_exported(program))
    if form == "training":
        assert forms(read(path)) == forms(trace(module, example))


def test_training_exports_fold_in_place_calls(tmp_path: Path) -> None:
    module = randomised(Residual())
    program = read(saved(exported(module, IMAGE), tmp_path / "net.pt2"))
    calls = [node.op for node in program.nodes]
    kept = {"aten.dropout", "aten.split_with_sizes", "aten.chunk", "aten.view", "aten.to.dtype"}
    assert not kept & set(calls)
    assert calls.count("aten.relu") == calls.count("aten.hardswish") == 1
    by_op = {node.op: node for node in program.nodes}
    assert by_op["aten.relu"].source == "act"
    assert by_op["aten.batch_norm"].args["cudnn_enabled"] is False
    assert by_op["aten.conv2d"].args["groups"] == 1
    assert {"conv.weight", "bn.running_var", "scale", "lifted_tensor_0"} <= set(program.weights)


def test_an_archive_is_converted_like_a_bundle(tmp_path: Path) -> None:
    path = saved(exported(randomised(Residual()), IMAGE), tmp_path / "net.pt2")
    conversion = pipeline.convert(path, ModelConfig(), tmp_path)
    assert conversion.architecture["container"] == "pt2"
    assert conversion.architecture["input_shape"] == [3, 8, 8]
    assert conversion.fusion["certificate"]["passed"]
    deploy = load_program(Path(conversion.files["deploy_program"]))
    assert not any(node.op == "aten.batch_norm" for node in deploy.nodes)
    with pytest.raises(InvalidConfig, match="brings its own program"):
        pipeline.convert(path, ModelConfig.from_json('{"architecture": "RepVGG-A0"}'), tmp_path)


def test_an_archives_weights_are_checked_as_a_checkpoints_are(tmp_path: Path) -> None:
    module = randomised(Residual())
    module.get_buffer("bn.running_var")[0] = -1
    path = saved(exported(module, IMAGE), tmp_path / "net.pt2")
    with pytest.raises(NegativeVariance, match=r"bn\.running_var"):
        pipeline.convert(path, ModelConfig(), tmp_path)


# In-place calls ----------------------------------------------------------------------------------


def _dead_view(y: Tensor) -> Tensor:
    z = y.view(y.shape[0], -1)
    return z.relu_().sum(1)


def _copied(y: Tensor) -> Tensor:
    return y.clone().copy_(y.mean(1, keepdim=True))


@pytest.mark.parametrize(
    "step", [steps.read_again, steps.through_detach, _dead_view, steps.view_of_the_result, _copied]
)
def test_safe_in_place_calls_keep_their_meaning(
    tmp_path: Path, step: Callable[[Tensor], Tensor]
) -> None:
    module = steps.Step(step).eval()
    (got,) = run(read(saved(exported(module, IMAGE), tmp_path / "net.pt2")), IMAGE)
    assert torch.equal(got, compute(module, (IMAGE,))[0])


def _fill(y: Tensor) -> Tensor:
    return y.fill_(1.0)


@pytest.mark.parametrize(
    ("step", "operator"),
    [
        (steps.write_through_view, "aten.mul_"),
        (steps.view_read_late, "aten.relu_"),
        (steps.whole_read_late, "aten.relu_"),
        (_fill, "aten.fill_"),
        (lambda y: y.clamp(0).sort(1)[0], "torch.ops.aten.sort.default"),
    ],
)
def test_what_cannot_be_folded_is_refused_by_name(
    tmp_path: Path, step: Callable[[Tensor], Tensor], operator: str
) -> None:
    path = saved(exported(steps.Step(step), IMAGE), tmp_path / "net.pt2")
    with pytest.raises(UnsupportedOperator, match=operator) as raised:
        read(path)
    assert operator in raised.value.extra["operator"]


def test_inputs_and_weights_are_never_written(tmp_path: Path) -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu_()

    with pytest.raises(InvalidProgram, match="changes an input or a weight"):
        read(saved(exported(Writes(), IMAGE), tmp_path / "net.pt2"))
    functional = exported(Writes(), IMAGE, form="functional")
    with pytest.raises(InvalidProgram, match="user_input_mutation"):
        read(saved(functional, tmp_path / "net.pt2"))


def test_training_mode_is_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5))
    path = saved(exported(net, IMAGE), tmp_path / "net.pt2")
    read(path)

    def train(document: Any) -> None:
        for node in document["graph_module"]["graph"]["nodes"]:
            for item in node["inputs"]:
                if item["name"] == "train":
                    item["arg"] = {"as_bool": True}

    entries = archives.with_graph(archives.entries_of(path), train)
    with pytest.raises(InvalidProgram, match="as in training"):
        read(archives.written(path, entries))


# What an export may be ---------------------------------------------------------------------------


def test_only_the_batch_may_be_dynamic(tmp_path: Path) -> None:
    net = nn.Conv2d(3, 4, 1).eval()
    fixed = torch.export.export(net, (IMAGE,))
    with pytest.raises(InvalidProgram, match="0 dynamic sizes") as raised:
        read(saved(fixed, tmp_path / "net.pt2"))
    assert "dynamic_shapes" in raised.value.remedy
    sizes = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", max=99)}
    free = torch.export.export(net, (IMAGE,), dynamic_shapes=[sizes])
    with pytest.raises(InvalidProgram, match="2 dynamic sizes"):
        read(saved(free, tmp_path / "net.pt2"))
    other = torch.export.export(net, (IMAGE,), dynamic_shapes=[{3: torch.export.Dim("w", max=9)}])
    with pytest.raises(InvalidProgram, match="no dynamic batch axis"):
        read(saved(other, tmp_path / "net.pt2"))
    with pytest.raises(InvalidProgram, match="may only be 3 to 9"):
        read(saved(exported(net, IMAGE[:1].repeat(4, 1, 1, 1), low=3, high=9), tmp_path / "n.pt2"))


def test_limits_are_kept(tmp_path: Path) -> None:
    path = saved(exported(randomised(Residual()), IMAGE), tmp_path / "net.pt2")
    read(path, Pt2Limits(tensor_expansion=1.0))
    for name, value in {
        "header_bytes": 1000,
        "graph_values": 100,
        "tensors": 3,
        "tensor_expansion": 0.01,
        "graph_nodes": 5,
        "graph_constant_bytes": 16,
        "graph_value_bytes": 1000,
    }.items():
        with pytest.raises(LimitExceeded, match=name) as raised:
            read(path, Pt2Limits(**{name: value}))
        assert raised.value.extra["limit"] == name


def test_names_of_weights_never_clash_with_names_of_nodes(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu_0 = nn.Parameter(torch.ones(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x) * self.relu_0

    for program in (
        read(saved(exported(Named(), IMAGE), tmp_path / "net.pt2")),
        trace(Named().eval(), (IMAGE,)),
    ):
        assert torch.equal(run(program, IMAGE)[0], IMAGE.relu())
        assert Ref("relu_0") in program.nodes[-1].args.values()


def test_json_of_the_archive_is_what_torch_writes(tmp_path: Path) -> None:
    """The layout that the reader was written for, so that a new torch shows here first."""
    path = saved(exported(nn.ReLU(), IMAGE), tmp_path / "net.pt2")
    document = json.loads(archives.entries_of(path)["models/model.json"])
    assert document["schema_version"]["major"] == 8
    assert set(document["range_constraints"]) == {"s77"} or len(document["range_constraints"]) == 1
