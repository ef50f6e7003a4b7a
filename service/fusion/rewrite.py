"""From a cover to a new program: fused operators where forms were chosen, the rest as it was."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from service.errors import FusionError
from service.fusion.analysis import Analysis
from service.fusion.cost import elements
from service.fusion.cover import Cover, emitted_geometry
from service.fusion.form import Form, Layout
from service.fusion.kernels import regrouped
from service.fusion.rules import CONVOLUTIONS
from service.graph.operators import DTYPES
from service.graph.program import Argument, Node, Program, Ref


@dataclass(frozen=True)
class Region:
    """One fused operator: which value of the old program it computes, from which root.

    `module` is the dotted path that stands for it, `node` the new operator, `weight` and `bias` the
    names of its tensors in the new program.
    """

    module: str
    output: str
    root: str
    form: Form
    node: str
    weight: str | None
    bias: str | None


@dataclass(frozen=True)
class Rewritten:
    """A fused program and its regions; `renamed` maps old values to new ones of another name."""

    program: Program
    regions: tuple[Region, ...]
    renamed: dict[str, str]


def rewrite(analysis: Analysis, cover: Cover, dtype: str) -> Rewritten:
    """Build the fused program with its weights in `dtype` (`float32`, `float64`, …).

    Kernels are computed one at a time in float64, so the peak is one kernel above the result.
    """
    return _Writer(analysis, cover, dtype).result()


class _Writer:
    def __init__(self, analysis: Analysis, cover: Cover, dtype: str) -> None:
        self.analysis, self.cover, self.dtype = analysis, cover, dtype
        self.nodes: list[Node] = []
        self.weights: dict[str, Tensor] = {}
        self.names: dict[str, str] = {}
        self.regions: list[Region] = []
        self.labels = labels(analysis, cover)
        kept = [n for n in analysis.program.nodes if cover.chosen.get(n.name, n) is None]
        self.taken = {name for node in kept for name in node.refs()}

    def result(self) -> Rewritten:
        program = self.analysis.program
        for node in program.nodes:
            if node.name not in self.cover.chosen:
                continue
            form = self.cover.chosen[node.name]
            if form is None:
                self._keep(node)
            elif form.trivial:
                self._alias(node, form)
            else:
                self._fuse(node, form)
        outputs = tuple(self._named(name) for name in program.outputs)
        fused = Program(program.inputs, tuple(self.nodes), outputs, self.weights).pruned()
        return Rewritten(
            fused if self.dtype == "float32" else fused.to(self.dtype),
            tuple(self.regions),
            self.names,
        )

    def _named(self, name: str) -> str:
        """The new name of an old value; constants become weights when first read."""
        if name in self.names:
            return self.names[name]
        if self.analysis.constants.settled(name) and name not in self.weights:
            original = self.analysis.program.weights.get(name)
            tensor = self.analysis.constants[name] if original is None else original
            self.weights[name] = self._cast(tensor)
        return name

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(DTYPES[self.dtype]) if tensor.is_floating_point() else tensor

    def _keep(self, node: Node) -> None:
        self.nodes.append(node.renamed({name: self._named(name) for name in node.refs()}))

    def _alias(self, node: Node, form: Form) -> None:
        root = self._named(form.root)
        if node.shape == self.analysis.specs[form.root].shape:
            self.names[node.name] = root
        else:
            self.nodes.append(_view(node, root))

    def _fuse(self, node: Node, form: Form) -> None:
        label = self.labels[node.name]
        root = self._named(form.root)
        geometry = emitted_geometry(form)
        kernel = regrouped(form.weight(), form.geometry.groups, geometry.groups)
        bias = form.bias.interior
        weight_name, bias_name = self._fresh(f"{label}.weight"), self._fresh(f"{label}.bias")
        shape = node.shape
        if form.layout is Layout.LAST:
            root_shape = self.analysis.specs[form.root].shape
            shape = (*root_shape[:-1], geometry.out_channels)
        viewed = shape != node.shape
        name = f"{node.name}_wide" if viewed else node.name
        if geometry.pointwise and geometry.depthwise:
            self._emit_scale(
                name,
                node,
                shape,
                root,
                kernel.reshape(-1),
                bias,
                (weight_name, bias_name),
                last=form.layout is Layout.LAST,
            )
        else:
            self.weights[weight_name] = self._cast(kernel)
            self.weights[bias_name] = self._cast(bias)
            if form.layout is Layout.LAST:
                op, args = "aten.linear", _linear(root, weight_name, bias_name)
            else:
                rank = len(geometry.kernel)
                root, padding = self._padding(node, form, root)
                op = f"aten.conv{rank}d"
                args = {
                    "input": Ref(root),
                    "weight": Ref(weight_name),
                    "bias": Ref(bias_name),
                    "stride": geometry.stride,
                    "padding": padding,
                    "dilation": geometry.dilation,
                    "groups": geometry.groups,
                }
            self.nodes.append(Node(name, op, args, shape, node.dtype, label))
        if viewed:
            self.nodes.append(_view(node, name))
        self.regions.append(
            Region(label, node.name, form.root, form, node.name, weight_name, bias_name)
        )

    def _padding(self, node: Node, form: Form, root: str) -> tuple[str, tuple[int, ...]]:
        """Padding for the convolution where it is symmetric, else a padded or cropped root."""
        geometry = form.geometry
        if geometry.padding is not None:
            return root, geometry.padding
        pairs = geometry.pads
        pads = tuple(n for pair in reversed(pairs) for n in pair)
        size = (n + sum(pair) for n, pair in zip(geometry.in_size, pairs, strict=True))
        padded = Node(
            f"{node.name}_padded",
            "aten.constant_pad_nd",
            {"self": Ref(root), "pad": pads, "value": 0.0},
            (None, geometry.in_channels, *size),
            node.dtype,
            self.labels[node.name],
        )
        self.nodes.append(padded)
        return padded.name, (0,) * len(pairs)

    def _emit_scale(
        self,
        name: str,
        node: Node,
        shape: tuple[int | None, ...] | None,
        root: str,
        scale: Tensor,
        shift: Tensor,
        tensors: tuple[str, str],
        *,
        last: bool,
    ) -> None:
        """A per-channel scale and shift: a batch norm with trivial statistics, or `x * w + b`."""
        weight, bias = tensors
        self.weights[weight], self.weights[bias] = self._cast(scale), self._cast(shift)
        label = self.labels[node.name]
        if last and len(shape or ()) != 2:
            product = f"{name}_scaled"
            multiply: dict[str, Argument] = {"self": Ref(root), "other": Ref(weight)}
            shift_args: dict[str, Argument] = {
                "self": Ref(product),
                "other": Ref(bias),
                "alpha": 1,
            }
            self.nodes.append(Node(product, "aten.mul.Tensor", multiply, shape, node.dtype, label))
            self.nodes.append(Node(name, "aten.add.Tensor", shift_args, shape, node.dtype, label))
            return
        mean, variance = self._fresh(f"{weight}.mean"), self._fresh(f"{weight}.variance")
        self.weights[mean] = self._cast(torch.zeros_like(shift))
        self.weights[variance] = self._cast(torch.ones_like(shift))
        args: dict[str, Argument] = {
            "input": Ref(root),
            "weight": Ref(weight),
            "bias": Ref(bias),
            "running_mean": Ref(mean),
            "running_var": Ref(variance),
            "training": False,
            "momentum": 0.1,
            "eps": 0.0,
            "cudnn_enabled": False,
        }
        self.nodes.append(Node(name, "aten.batch_norm", args, shape, node.dtype, label))

    def _fresh(self, name: str) -> str:
        """`name`, or the first `name.2`, `name.3`, … that no value has."""
        taken = self.weights.keys() | self.taken
        if name not in taken:
            return name
        return next(f"{name}.{i}" for i in range(2, len(taken) + 3) if f"{name}.{i}" not in taken)


def _linear(root: str, weight: str, bias: str) -> dict[str, Argument]:
    return {"input": Ref(root), "weight": Ref(weight), "bias": Ref(bias)}


def _view(node: Node, value: str) -> Node:
    """`value` in the shape of `node`; the one unknown size is left to the view."""
    shape = node.shape or ()
    if sum(size is None for size in shape) > 1:
        raise FusionError(f"{node.name} has two unknown sizes, so its view cannot be written.")
    size = tuple(-1 if n is None else n for n in shape)
    return Node(
        node.name,
        "aten.reshape",
        {"self": Ref(value), "shape": size},
        shape,
        node.dtype,
        node.source,
    )


def labels(analysis: Analysis, cover: Cover) -> dict[str, str]:
    """A module path for every fused value: what its sources share, if that is unambiguous."""
    nodes = {node.name: node for node in analysis.program.nodes}
    fused = {name: form for name, form in cover.chosen.items() if form and not form.trivial}
    common = {name: _common([nodes[n].source for n in form.nodes]) for name, form in fused.items()}
    uses = list(common.values())
    result = {}
    for name, form in fused.items():
        path = common[name]
        if not path or uses.count(path) > 1:
            path = max(
                (nodes[n] for n in sorted(form.nodes)),
                key=lambda node: (node.op in CONVOLUTIONS, elements(node.shape), node.source),
            ).source
        result[name] = path or name
    return result


def _common(paths: list[str]) -> str:
    """The longest dotted prefix of all `paths`."""
    parts = [path.split(".") for path in paths]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared)
