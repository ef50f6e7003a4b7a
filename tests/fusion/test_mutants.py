"""Seeded wrong engines: fused by each of them, a network where it matters must fail to certify."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from service.fusion import affine, certify, fuse, kernels, rewrite, rules
from service.fusion.affine import Form, Geometry, Weight
from service.fusion.field import Field
from service.graph import Program
from tests.fusion.networks import NETWORKS

Patch = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Mutant:
    """One wrong engine and the network that shows it."""

    name: str
    network: str
    patch: Patch


def passes(program: Program) -> bool:
    return certify(fuse(program)).passed


def _kernels(name: str, wrong: Callable[..., Tensor]) -> Patch:
    """`kernels.<name>` gives `wrong(right, *args)`, where `right` is what it should give."""
    original = getattr(kernels, name)
    return lambda patch: patch.setattr(kernels, name, lambda *args: wrong(original(*args), *args))


def _form(module: Any, name: str, wrong: Callable[..., Form]) -> Patch:
    """`module.<name>` gives `wrong(right, *args)`."""
    original = getattr(module, name)
    return lambda patch: patch.setattr(
        module, name, lambda *args, **kwargs: wrong(original(*args, **kwargs), *args)
    )


def _emitted(wrong: Callable[[Tensor], Tensor]) -> Patch:
    """Every kernel is changed just before it is written into the program."""
    original = Form.weight

    def outermost(form: Form, memo: Any = None) -> Tensor:
        kernel = original(form, memo)
        return wrong(kernel) if memo is None else kernel

    return lambda patch: patch.setattr(Form, "weight", outermost)


def _bias(wrong: Callable[[Tensor], Tensor]) -> Patch:
    """Every bias vector is changed just before it is written into the program."""
    original = rewrite._Writer._cast

    def changed(writer: Any, tensor: Tensor) -> Tensor:
        return original(writer, wrong(tensor) if tensor.dim() == 1 else tensor)

    return lambda patch: patch.setattr(rewrite._Writer, "_cast", changed)


def _convolve(**changes: Callable[[Any], Any]) -> Patch:
    """`affine.convolve` is called with changed arguments."""
    original = affine.convolve
    names = ("form", "weight", "bias", "stride", "padding", "dilation", "groups")

    def changed(*args: Any) -> Form:
        named = dict(zip(names, args, strict=False))
        for name, change in changes.items():
            named[name] = change(named[name])
        return original(*named.values(), *args[len(names) :])

    return lambda patch: patch.setattr(affine, "convolve", changed)


def _constants(**keys: Callable[[Any], Any]) -> Patch:
    """Rules read changed values of operator arguments."""
    original = rules.Call.value

    def changed(call: rules.Call, key: str) -> Any:
        value = original(call, key)
        return keys[key](value) if key in keys and value is not None else value

    return lambda patch: patch.setattr(rules.Call, "value", changed)


def _transposed(kernel: Tensor) -> Tensor:
    square = kernel.dim() > 3 and kernel.shape[-1] == kernel.shape[-2]
    return kernel.transpose(-1, -2) if square else kernel


def _flipped(kernel: Tensor) -> Tensor:
    return kernel.flip(tuple(range(2, kernel.dim()))) if kernel.dim() > 2 else kernel


def _diagonal(right: Tensor, kernel: Tensor, groups: int, target: int) -> Tensor:
    """A grouped identity with its ones at [i, i] as if there were no groups."""
    if groups == target or kernel.shape[1] != 1 or groups != kernel.shape[0]:
        return right
    wrong = torch.zeros_like(right)
    for channel in range(right.shape[0]):
        wrong[channel, min(channel, right.shape[1] - 1)] = kernel[channel, 0]
    return wrong


def _shifted(right: Tensor, kernel: Tensor, before: Sequence[int], size: Sequence[int]) -> Tensor:
    small = kernel.dim() > 2 and tuple(kernel.shape[2:]) != tuple(size)
    return right.roll(1, dims=-1) if small else right


def _corner(right: Tensor, kernel: Tensor, before: Sequence[int], size: Sequence[int]) -> Tensor:
    wrong = torch.zeros_like(right)
    wrong[tuple(slice(0, n) for n in kernel.shape)] = kernel
    return wrong


def _first_of(right: Form, a: Form, b: Form, sign: float = 1.0) -> Form:
    return replace(right, kernel=replace(a, trivial=False).kernel) if _alike(right, a) else right


def _alike(right: Form, a: Form) -> bool:
    return right.geometry == a.geometry


def _without_shift(right: Form, form: Form, scale: Tensor, shift: Tensor, *_: Any) -> Form:
    return replace(right, bias=form.bias.scaled(scale, torch.zeros_like(shift)))


def _unscaled_bias(right: Form, form: Form, scale: Tensor, shift: Tensor, *_: Any) -> Form:
    return replace(right, bias=form.bias.scaled(torch.ones_like(scale), shift))


def _unscaled_kernel(right: Form, form: Form, *_: Any) -> Form:
    return replace(right, kernel=form.kernel)


def _scaled_inputs(right: Form, form: Form, scale: Tensor, *_: Any) -> Form:
    """Scales input channels instead of output channels."""

    def kernel(memo: Any) -> Tensor:
        weight = form.weight(memo)
        factor = scale[: weight.shape[1]].reshape(1, -1, *[1] * (weight.dim() - 2))
        return weight * factor

    return replace(right, kernel=kernel) if right.geometry.groups == 1 else right


def _forgotten_bias(right: Form, form: Form, weight: Weight, bias: Any, *_: Any) -> Form:
    """The bias that flows through the convolution is lost; its own stays."""
    own = torch.zeros(weight.shape[0], dtype=torch.float64) if bias is None else bias
    return replace(right, bias=Field.constant(own, right.geometry.out_size))


def _off_by_one(padding: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(b + 1, a - 1) if b and a else (b, a) for b, a in padding]


MUTANTS = [
    Mutant("transposed kernel", "repvgg", _emitted(_transposed)),
    Mutant("flipped kernel", "repvgg", _emitted(_flipped)),
    Mutant("rows of the kernel rotated", "acnet", _emitted(lambda k: k.roll(1, dims=-1))),
    Mutant("output channels reversed", "repvgg", _emitted(lambda k: k.flip(0))),
    Mutant("input channels rotated", "acnet", _emitted(lambda k: k.roll(1, dims=1))),
    Mutant("kernel through half precision", "repvgg", _emitted(lambda k: k.half().double())),
    Mutant("kernel through single precision", "repvgg", _emitted(lambda k: k.float().double())),
    Mutant("a tap lost", "acnet", _emitted(lambda k: k.index_fill(-1, torch.tensor([0]), 0.0))),
    Mutant("kernel scaled by a part in a thousand", "dbb", _emitted(lambda k: k * 1.001)),
    Mutant("bias negated", "repvgg", _bias(torch.neg)),
    Mutant("bias lost", "repvgg", _bias(torch.zeros_like)),
    Mutant("bias of the wrong channel", "repvgg", _bias(lambda b: b.roll(1))),
    Mutant("branch dropped", "repvgg", _form(affine, "add", _first_of)),
    Mutant(
        "branch added twice",
        "repvgg",
        _form(affine, "add", lambda right, a, b, sign=1.0: replace(
            right, bias=right.bias.added(b.bias)
        )),
    ),
    Mutant(
        "subtraction added",
        "sliced",
        _form(affine, "add", lambda right, a, b, sign=1.0: replace(
            right, bias=a.bias.added(b.bias, abs(sign))
        )),
    ),
    Mutant("1x1 in the corner", "repvgg", _kernels("embedded", _corner)),
    Mutant("1x1 off by one", "repvgg", _kernels("embedded", _shifted)),
    Mutant("grouped identity on the diagonal", "repvgg grouped", _kernels("regrouped", _diagonal)),
    Mutant("groups in the wrong order", "repvgg grouped", _kernels(
        "regrouped", lambda right, kernel, groups, target: right if groups == target
        else right.roll(1, dims=1)
    )),
    Mutant("composed kernel flipped", "spatial chain", _kernels(
        "composed", lambda right, *args: _flipped(right)
    )),
    Mutant("composition through the transpose", "chain", _kernels(
        "composed", lambda right, *args: right.roll(1, dims=0)
    )),
    Mutant("dilation at the wrong taps", "dilated", _kernels(
        "dilated", lambda right, kernel, dilation: right.roll(1, dims=-1)
        if any(d > 1 for d in dilation) else right
    )),
    Mutant("average divided wrongly", "dbb", lambda patch: patch.setattr(
        rules, "average_kernel",
        lambda channels, size, divisor: kernels.average_kernel(channels, size, divisor + 1),
    )),
    Mutant("eps of 1e-5 for 1e-3", "repvgg", _constants(eps=lambda eps: 1e-5)),
    Mutant("no eps", "repvgg", _constants(eps=lambda eps: 0.0)),
    Mutant("variance for deviation", "repvgg", _constants(running_var=torch.square)),
    Mutant("mean ignored", "repvgg", _constants(running_mean=torch.zeros_like)),
    Mutant("alpha ignored", "sliced", _constants(alpha=lambda alpha: 1)),
    Mutant("batch norm's shift lost", "acnet", _form(affine, "scale_shift", _without_shift)),
    Mutant("bias not scaled", "scaled", _form(affine, "scale_shift", _unscaled_bias)),
    Mutant("gamma not applied to the kernel", "acnet", _form(
        affine, "scale_shift", _unscaled_kernel
    )),
    Mutant("scale on input channels", "scaled", _form(affine, "scale_shift", _scaled_inputs)),
    Mutant("bias not carried through", "chain", _form(affine, "convolve", _forgotten_bias)),
    Mutant("own bias forgotten", "chain", _convolve(bias=lambda bias: None)),
    Mutant("padding off by one", "repvgg", _convolve(padding=_off_by_one)),
    Mutant("concatenated in reverse", "concatenated", _form(
        affine, "concatenate", lambda right, forms: replace(
            right, kernel=lambda memo: torch.cat(list(reversed(right.weight(memo).split(4))))
        )
    )),
    Mutant("slice off by one", "sliced", _form(
        affine, "slice_channels", lambda right, form, start, stop: right if not start
        else replace(right, bias=right.bias.map(lambda v: v.roll(1, dims=0)))
    )),
    Mutant("crop on the wrong side", "cropped", lambda patch: patch.setattr(
        affine, "pad", (lambda pad: lambda form, padding, value: pad(
            form, [(after, before) for before, after in padding], value
        ))(affine.pad),
    )),
    Mutant("border of the bias ignored", "biased border", lambda patch: patch.setattr(
        Field, "is_constant", lambda field: True
    )),
    Mutant("zero padding between kernels ignored", "padded twice", lambda patch: patch.setattr(
        Geometry, "reads_nothing_outside", lambda self, before, after: True
    )),
    Mutant("crop off by one", "cropped", lambda patch: patch.setattr(
        Geometry, "pads", property((lambda pads: lambda geometry: tuple(
            (before + 1, after - 1) for before, after in pads(geometry)
        ))(Geometry.pads.fget)),
    )),
]  # fmt: skip


@pytest.mark.parametrize("network", [name for name in NETWORKS if name != "narrow"])
def test_the_right_engine_passes(network: str) -> None:
    assert passes(NETWORKS[network]())


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_wrong_engine_is_rejected(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    program = NETWORKS[mutant.network]()
    assert passes(program)
    mutant.patch(monkeypatch)
    certificate = certify(fuse(program))
    assert not certificate.passed
    assert certificate.failures


def test_there_are_enough_mutants() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 30


def test_an_output_that_hardly_varies_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random kernel moves this output by a part in 10,000; its variation is no larger."""
    program = NETWORKS["narrow"]()
    _emitted(lambda kernel: torch.randn(kernel.shape, dtype=kernel.dtype))(monkeypatch)
    fusion = fuse(program)
    certificate = certify(fusion)
    assert certificate.output_variation < 1e-2
    assert certificate.error_end_to_end > certificate.limits.end_to_end
    assert not certificate.passed
