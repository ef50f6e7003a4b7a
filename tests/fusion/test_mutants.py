"""The mutation test: an engine with any one of these faults never gets its certificate.

Each mutant replaces one function of the engine by a wrong one whose results still fit together, so
that nothing but the numbers can tell. The unchanged engine passes on every network used here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from service.fusion import Certificate, affine, certify, constants, cover, fuse, kernels, rewrite
from service.fusion import rules as rules_module
from service.fusion.field import Field
from service.fusion.form import Form, Geometry, Weight
from service.fusion.rules import JOIN, UNARY, Call
from service.graph import run
from service.graph.program import Argument
from tests.fusion.networks import NETWORKS, narrow

Patch = pytest.MonkeyPatch
_results: list[tuple[str, str, Certificate]] = []


@dataclass(frozen=True)
class Mutant:
    name: str
    network: str
    apply: Callable[[Patch], None]


MUTANTS: list[Mutant] = []


def mutant(name: str, *networks: str) -> Callable[[Callable[[Patch], None]], None]:
    def add(apply: Callable[[Patch], None]) -> None:
        MUTANTS.extend(Mutant(name, network, apply) for network in networks)

    return add


def emitted(name: str, network: str, change: Callable[[Tensor], Tensor]) -> None:
    """A mutant that changes every kernel just before it is written."""

    def apply(patch: Patch) -> None:
        honest = kernels.regrouped
        patch.setattr(rewrite, "regrouped", lambda *args: change(honest(*args)).contiguous())

    MUTANTS.append(Mutant(name, network, apply))


def _without_last(kernel: Tensor) -> Tensor:
    kernel = kernel.clone()
    kernel.flatten()[-1] = 0.0
    return kernel


emitted("kernel transposed", "repvgg", lambda k: k.transpose(-1, -2))
emitted("kernel flipped", "acnet", lambda k: k.flip(-1))
emitted("kernel flipped both ways", "dbb", lambda k: k.flip(-1, -2))
emitted("kernel shifted by a tap", "dilated", lambda k: k.roll(1, -1))
emitted("input and output channels swapped", "repvgg", lambda k: k.transpose(0, 1))
emitted("output channels off by one", "chain", lambda k: k.roll(1, 0))
emitted("last tap lost", "dbb 5x5", _without_last)
emitted("kernel negated", "narrow", lambda k: -k)
emitted("linear weight transposed", "tokens", lambda k: k.transpose(0, 1))
emitted("kernel in float16", "repvgg", lambda k: k.half().double())
emitted("kernel a hair too large", "acnet", lambda k: k * (1 + 1e-10))


# Branches ----------------------------------------------------------------------------------------


def _joins(change: Callable[..., Form]) -> Callable[[Patch], None]:
    def apply(patch: Patch) -> None:
        honest = affine.add
        patch.setattr(affine, "add", lambda a, b, sign=1.0: change(honest, a, b, sign))

    return apply


def _silent(form: Form) -> Form:
    """The same form with kernel and bias of zero."""
    zero = torch.zeros(form.geometry.out_channels, dtype=torch.float64)
    return affine.scale_shift(replace(form, bias=form.bias.scaled(zero, zero)), zero, zero)


mutant("second branch dropped", "repvgg", "acnet")(
    _joins(lambda add, a, b, sign: add(a, _silent(b), sign))
)
mutant("first branch dropped", "repvgg strided")(
    _joins(lambda add, a, b, sign: add(_silent(a), b, sign))
)
mutant("branch subtracted", "dbb")(_joins(lambda add, a, b, sign: add(a, b, -sign)))
mutant("branch counted twice", "acnet")(_joins(lambda add, a, b, sign: add(a, b, 2 * sign)))
mutant("branch biases forgotten", "repvgg")(
    _joins(lambda add, a, b, sign: replace(add(a, b, sign), bias=a.bias))
)


@mutant("small kernel at the corner", "repvgg", "repvgg strided")
def _(patch: Patch) -> None:
    honest = kernels.window
    patch.setattr(
        kernels, "window", lambda kernel, before, size: honest(kernel, [0] * len(before), size)
    )


@mutant("small kernel off by one", "acnet", "dbb 5x5")
def _(patch: Patch) -> None:
    honest = kernels.window

    def wrong(kernel: Tensor, before: list[int], size: tuple[int, ...]) -> Tensor:
        room = [n - k for n, k in zip(kernel.shape[2:], size, strict=True)]
        moved = [(b + 1) % (r + 1) for b, r in zip(before, room, strict=True)]
        return honest(kernel, moved, size)

    patch.setattr(kernels, "window", wrong)


@mutant("horizontal and vertical swapped", "acnet")
def _(patch: Patch) -> None:
    honest = kernels.window

    def wrong(kernel: Tensor, before: list[int], size: tuple[int, ...]) -> Tensor:
        return honest(kernel, before[::-1], size[::-1]).transpose(2, 3)

    patch.setattr(kernels, "window", wrong)


@mutant("dilation ignored", "dilated")
def _(patch: Patch) -> None:
    honest = kernels.dilated

    def wrong(kernel: Tensor, dilation: Any) -> Tensor:
        dense = honest(kernel, dilation)
        pads = [
            n
            for k, m in zip(kernel.shape[:1:-1], dense.shape[:1:-1], strict=True)
            for n in (0, m - k)
        ]
        return F.pad(kernel, pads)

    patch.setattr(kernels, "dilated", wrong)


# Groups and identities ---------------------------------------------------------------------------


def _wide(place: Callable[[int, int], int]) -> Callable[[Patch], None]:
    def apply(patch: Patch) -> None:
        def wrong(kernel: Tensor, groups: int, target: int) -> Tensor:
            if groups == target:
                return kernel
            merged = groups // target
            blocks = kernel.reshape(target, merged, kernel.shape[0] // groups, *kernel.shape[1:])
            wide = blocks.new_zeros(*blocks.shape[:3], merged, *blocks.shape[3:])
            for index in range(merged):
                wide[:, index, :, place(index, merged)] = blocks[:, index]
            return wide.reshape(kernel.shape[0], merged * kernel.shape[1], *kernel.shape[2:])

        patch.setattr(kernels, "regrouped", wrong)
        patch.setattr(rewrite, "regrouped", wrong)

    return apply


mutant("identity reversed", "repvgg", "repvgg grouped")(_wide(lambda i, n: n - 1 - i))
mutant("identity off by one", "repvgg", "repvgg grouped")(_wide(lambda i, n: (i + 1) % n))
mutant("identity on the first channel", "repvgg grouped")(_wide(lambda i, n: 0))


@mutant("groups interleaved", "dbb")
def _(patch: Patch) -> None:
    honest = kernels.composed

    def wrong(outer: Tensor, inner: Tensor, stride: Any, groups: int) -> Tensor:
        if groups > 1:
            inner = inner.unflatten(0, (groups, -1)).transpose(0, 1).flatten(0, 1)
        return honest(outer, inner, stride, groups)

    patch.setattr(kernels, "composed", wrong)


# Batch norm, scale and shift ---------------------------------------------------------------------


def _norms(**wrong: Argument) -> Callable[[Patch], None]:
    def apply(patch: Patch) -> None:
        honest = UNARY["aten.batch_norm"]

        def rule(call: Call, form: Form) -> Form:
            args = {**call.node.args, **wrong}
            return honest(replace(call, node=replace(call.node, args=args)), form)

        patch.setitem(UNARY, "aten.batch_norm", rule)

    return apply


mutant("eps of another network", "repvgg", "acnet")(_norms(eps=1e-5))
mutant("variance without eps", "dbb")(_norms(eps=0.0))
mutant("gamma ignored", "repvgg", "cropped")(_norms(weight=None))
mutant("beta ignored", "acnet")(_norms(bias=None))


def _scales(change: Callable[..., Form]) -> Callable[[Patch], None]:
    def apply(patch: Patch) -> None:
        honest = affine.scale_shift
        patch.setattr(
            affine,
            "scale_shift",
            lambda form, scale, shift, *rules: change(honest, form, scale, shift, *rules),
        )

    return apply


mutant("shift lost", "repvgg")(
    _scales(lambda honest, f, scale, shift, *r: honest(f, scale, 0 * shift, *r))
)
mutant("shift negated", "acnet")(
    _scales(lambda honest, f, scale, shift, *r: honest(f, scale, -shift, *r))
)
mutant("shift before scale", "repvgg strided")(
    _scales(lambda honest, f, scale, shift, *r: honest(f, scale, scale * shift, *r))
)
mutant("scale inverted", "cropped")(
    _scales(lambda honest, f, scale, shift, *r: honest(f, 1 / scale, shift, *r))
)
mutant("variance for deviation", "concatenated")(
    _scales(lambda honest, f, scale, shift, *r: honest(f, scale * scale.abs(), shift, *r))
)
mutant("one scale for all channels", "dilated")(
    _scales(lambda honest, f, scale, shift, *r: honest(f, scale.mean().expand_as(scale), shift, *r))
)
mutant("bias not scaled", "scaled")(
    _scales(
        lambda honest, f, scale, shift, *r: replace(
            honest(f, scale, shift, *r), bias=f.bias.scaled(torch.ones_like(scale), shift)
        )
    )
)


@mutant("division as multiplication", "scaled")
def _(patch: Patch) -> None:
    honest = UNARY["aten.div.Tensor"]

    def wrong(call: Call, form: Form) -> Form:
        return honest(replace(call, node=replace(call.node, op="aten.mul.Tensor")), form)

    patch.setitem(UNARY, "aten.div.Tensor", wrong)


@mutant("constant minus data as data minus constant", "scaled")
def _(patch: Patch) -> None:
    honest = UNARY["aten.sub.Tensor"]

    def wrong(call: Call, form: Form) -> Form:
        minus = torch.full((form.geometry.out_channels,), -1.0, dtype=torch.float64)
        return affine.scale_shift(honest(call, form), minus, torch.zeros_like(minus))

    patch.setitem(UNARY, "aten.sub.Tensor", wrong)


# Sequences ---------------------------------------------------------------------------------------


def _convolves(change: Callable[..., Form]) -> Callable[[Patch], None]:
    def apply(patch: Patch) -> None:
        honest = affine.convolve
        patch.setattr(affine, "convolve", lambda *args: change(honest, *args))

    return apply


mutant("outer bias forgotten", "chain")(
    _convolves(lambda honest, form, weight, bias, *rest: honest(form, weight, None, *rest))
)
mutant("outer bias negated", "chain", "tokens")(
    _convolves(
        lambda honest, form, weight, bias, *rest: honest(
            form, weight, None if bias is None else -bias, *rest
        )
    )
)


def _convolved(change: Callable[[Field, Field], Field]) -> Callable[[Patch], None]:
    def apply(patch: Patch) -> None:
        honest = Field.convolved
        patch.setattr(Field, "convolved", lambda self, *args: change(self, honest(self, *args)))

    return apply


mutant("inner bias forgotten", "chain", "spatial chain", "dbb")(
    _convolved(lambda before, after: after.map(torch.zeros_like))
)
mutant("inner bias halved", "concatenated", "tokens")(
    _convolved(lambda before, after: after.map(lambda values: values / 2))
)
mutant("inner bias on the wrong channel", "chain")(
    _convolved(lambda before, after: after.map(lambda values: values.roll(1, 0)))
)


def _composes(change: Callable[..., Tensor]) -> Callable[[Patch], None]:
    def apply(patch: Patch) -> None:
        honest = kernels.composed
        patch.setattr(kernels, "composed", lambda *args: change(honest, *args))

    return apply


mutant("inner kernel flipped", "spatial chain")(
    _composes(lambda honest, outer, inner, *rest: honest(outer, inner.flip(-1), *rest))
)
mutant("outer kernel flipped", "spatial chain")(
    _composes(lambda honest, outer, inner, *rest: honest(outer.flip(-2), inner, *rest))
)
mutant("intermediate channels reversed", "chain", "tokens")(
    _composes(lambda honest, outer, inner, *rest: honest(outer.flip(1), inner, *rest))
)


@mutant("kernels composed in the wrong order", "tokens")
def _(patch: Patch) -> None:
    honest = kernels.composed

    def wrong(outer: Tensor, inner: Tensor, stride: Any, groups: int) -> Tensor:
        square = outer.shape[0] == inner.shape[1] and outer.shape[1] == inner.shape[0]
        if groups == 1 and square:
            return honest(outer, inner, stride, groups).transpose(0, 1)
        return honest(outer, inner, stride, groups)

    patch.setattr(kernels, "composed", wrong)


@mutant("stride not composed", "spatial chain")
def _(patch: Patch) -> None:
    honest = kernels.composed

    def wrong(outer: Tensor, inner: Tensor, stride: Any, groups: int) -> Tensor:
        right = honest(outer, inner, stride, groups)
        dense = honest(outer, inner, [1] * len(stride), groups)
        pads = [
            n
            for a, b in zip(right.shape[:1:-1], dense.shape[:1:-1], strict=True)
            for n in (0, a - b)
        ]
        return F.pad(dense, pads)

    patch.setattr(kernels, "composed", wrong)


@mutant("average over one more position", "dbb")
def _(patch: Patch) -> None:
    honest = kernels.average_kernel
    patch.setattr(
        rules_module, "average_kernel", lambda channels, size, n: honest(channels, size, n + 1)
    )


# Channels ----------------------------------------------------------------------------------------


@mutant("concatenation reversed", "concatenated")
def _(patch: Patch) -> None:
    honest = affine.concatenate
    patch.setattr(affine, "concatenate", lambda forms: honest(list(reversed(forms))))


@mutant("slice off by one", "sliced")
def _(patch: Patch) -> None:
    honest = affine.slice_channels
    patch.setattr(
        affine,
        "slice_channels",
        lambda form, start, stop: honest(form, start - bool(start), stop - bool(start)),
    )


@mutant("alpha ignored", "sliced")
def _(patch: Patch) -> None:
    honest = JOIN["aten.sub.Tensor"]

    def wrong(call: Call, forms: list[Form]) -> Form:
        args = {**call.node.args, "alpha": 1}
        return honest(replace(call, node=replace(call.node, args=args)), forms)

    patch.setitem(JOIN, "aten.sub.Tensor", wrong)


@mutant("subtraction as addition", "sliced")
def _(patch: Patch) -> None:
    patch.setitem(
        JOIN,
        "aten.sub.Tensor",
        lambda call, forms: affine.add(forms[0], forms[1], float(call.value("alpha"))),
    )


# Borders -----------------------------------------------------------------------------------------


@mutant("crop from the other side", "cropped")
def _(patch: Patch) -> None:
    honest = affine.pad
    patch.setattr(
        affine,
        "pad",
        lambda form, padding, value: honest(form, [(a, b) for b, a in padding], value),
    )


@mutant("padding after a spatial kernel taken as exact", "padded twice")
def _(patch: Patch) -> None:
    patch.setattr(Geometry, "reads_nothing_outside", lambda *_: True)


@mutant("interior bias at the border too", "biased border")
def _(patch: Patch) -> None:
    patch.setattr(cover, "usable", lambda form: True)


@mutant("border bias in the interior", "biased border")
def _(patch: Patch) -> None:
    patch.setattr(cover, "usable", lambda form: True)
    patch.setattr(Field, "interior", property(lambda self: self.values.flatten(1)[:, 0]))


# Precision ---------------------------------------------------------------------------------------


@mutant("weights read in float16", "acnet")
def _(patch: Patch) -> None:
    _narrowed(patch, torch.float16)


@mutant("weights read in bfloat16", "repvgg")
def _(patch: Patch) -> None:
    _narrowed(patch, torch.bfloat16)


def _narrowed(patch: Patch, dtype: torch.dtype) -> None:
    patch.setattr(
        constants,
        "_widened",
        lambda tensor: tensor.to(dtype).double() if tensor.is_floating_point() else tensor,
    )


@mutant("float32 kernels in the float64 check", "repvgg")
def _(patch: Patch) -> None:
    honest = rewrite._Writer._cast
    patch.setattr(
        rewrite._Writer,
        "_cast",
        lambda self, x: honest(self, x.float() if x.is_floating_point() else x),
    )


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.name} ({m.network})")
def test_a_mutant_gets_no_certificate(mutant: Mutant, monkeypatch: Patch) -> None:
    program = NETWORKS[mutant.network]()
    mutant.apply(monkeypatch)
    certificate = certify(fuse(program))
    _results.append((mutant.name, mutant.network, certificate))
    assert not certificate.passed
    assert certificate.failures


@pytest.mark.parametrize("network", NETWORKS)
def test_the_unchanged_engine_gets_its_certificate(network: str) -> None:
    fusion = fuse(NETWORKS[network]())
    certificate = certify(fusion)
    assert certificate.passed, certificate.failures
    refused = network in {"padded twice", "biased border"}
    assert bool(fusion.regions) is not refused


def test_enough_mutants_were_killed(capsys: pytest.CaptureFixture[str]) -> None:
    if len(_results) < len(MUTANTS):
        pytest.skip("not every mutant ran in this session")
    with capsys.disabled():
        print(f"\n{'mutant':46s} {'network':16s} {'region':>9s} {'float32':>9s}")
        for name, network, c in _results:
            print(f"{name:46s} {network:16s} {c.error_float64:9.1e} {c.error_end_to_end:9.1e}")
    assert len({name for name, _, _ in _results}) >= 30
    assert not any(certificate.passed for _, _, certificate in _results)


def test_a_random_stem_in_a_network_that_hardly_varies(monkeypatch: Patch) -> None:
    """The outputs agree to four digits, as the official check would have it, and still fail."""
    honest = kernels.regrouped

    def random(*args: Any) -> Tensor:
        kernel = honest(*args)
        seeded = torch.Generator().manual_seed(0)
        noise = torch.randn(kernel.shape, generator=seeded, dtype=torch.float64)
        return noise * kernel.square().mean().sqrt()

    monkeypatch.setattr(rewrite, "regrouped", random)
    program = narrow()
    fusion = fuse(program)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(run(fusion.program, x)[0], run(program, x)[0], rtol=1e-2, atol=1e-3)
    certificate = certify(fusion)
    assert not certificate.passed
    assert certificate.error_float64 > 1e-3
    assert certificate.error_end_to_end > 1e-3


def test_a_served_program_that_is_not_the_checked_one_fails() -> None:
    fusion = fuse(NETWORKS["repvgg"]())
    weights = dict(fusion.program.weights)
    name = fusion.regions[0].weight
    assert name is not None
    weights[name] = weights[name].roll(1, 0)
    certificate = certify(fusion, served=replace(fusion.program, weights=weights))
    assert certificate.error_float64 <= 1e-12
    assert not certificate.passed


def test_weights_assigned_wrongly_by_the_weight_reader_fail(monkeypatch: Patch) -> None:
    monkeypatch.setattr(Weight, "of", staticmethod(lambda t: Weight(tuple(t.shape), lambda: 2 * t)))
    assert not certify(fuse(NETWORKS["dbb"]())).passed
