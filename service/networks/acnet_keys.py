"""Recognising the networks of DingXiaoH/ACNet."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import nn

from service.networks import acnet
from service.networks.family import Family, Reading, Values
from service.networks.keys import Keys, Shape

_ACB = ("acb.square_conv.weight", "acb.fused_conv.weight")
_ANY = (*_ACB, "square_conv.weight", "fused_conv.weight", "conv.weight")


def _kernel(keys: Keys, layer: str) -> Shape:
    return keys.under(f"{layer}.").shape(*_ANY)


def _classes(keys: Keys, head: str) -> int:
    return keys.shape(f"{head}.weight", rank=2)[0]


def _depths(keys: Keys, block: str) -> list[int]:
    stages = [keys.under(f"stage{i}.") for i in range(1, _stages(keys) + 1)]
    return [stage.count(block) for stage in stages]


def _stages(keys: Keys) -> int:
    return keys.under("stage").count_from(1)


def _quick(keys: Keys, hints: Values) -> Values:
    return {
        "widths": [_kernel(keys, f"conv{i}")[0] for i in (1, 2, 3)],
        "hidden": keys.shape("fc1.weight", rank=2)[0],
        "in_channels": _kernel(keys, "conv1")[1],
        "num_classes": _classes(keys, "fc2"),
    }


def _vgg(keys: Keys, hints: Values) -> Values:
    layers = keys.under("stem.conv").count_from(1)
    return {
        "widths": [keys.under(f"stem.conv{i}.").width() for i in range(1, layers + 1)],
        "hidden": keys.shape("linear1.weight", rank=2)[0],
        "in_channels": _kernel(keys, "stem.conv1")[1],
        "num_classes": _classes(keys, "linear2"),
    }


def _shortcut(keys: Keys, hints: Values) -> Values:
    depths = _depths(keys, "")
    return {
        "num_blocks": depths,
        "widths": [keys.under(f"stage{i + 1}.").width() for i in range(len(depths))],
        "stem_width": _kernel(keys, "conv1")[0],
        "in_channels": _kernel(keys, "conv1")[1],
        "num_classes": _classes(keys, "linear"),
    }


def _cifar(keys: Keys, hints: Values) -> Values:
    depths = _depths(keys, "block")
    return {
        "num_blocks": depths,
        "widths": [keys.under(f"stage{i + 1}.").width() for i in range(len(depths))],
        "in_channels": _kernel(keys, "stage1.conv1")[1],
        "num_classes": _classes(keys, "linear"),
    }


def _stage(keys: Keys, hints: Values) -> Values:
    stages = range(1, _stages(keys) + 1)
    return {
        "num_blocks": _depths(keys, "block"),
        "planes": [keys.under(f"stage{i}.block0.conv2.").width() for i in stages],
        "widths": [keys.under(f"stage{i}.projection.").width() for i in stages],
        "stem_width": _kernel(keys, "conv1")[0],
        "in_channels": _kernel(keys, "conv1")[1],
        "num_classes": _classes(keys, "fc"),
    }


def _wide(keys: Keys, hints: Values) -> Values:
    stages = [keys.under(f"stage{i}.") for i in range(1, _stages(keys) + 1)]
    return {
        "num_blocks": [stage.under("block").count_from(1) for stage in stages],
        "widths": [stage.under("block1.conv2.bn.").width() for stage in stages],
        "stem_width": _kernel(keys, "conv1")[0],
        "in_channels": _kernel(keys, "conv1")[1],
        "num_classes": _classes(keys, "linear"),
    }


def _mobile(keys: Keys, hints: Values) -> Values:
    blocks = keys.count("stem.")
    widths = [keys.under(f"stem.{i}.pointwise.").width() for i in range(blocks)]
    values: Values = {
        "stem_width": _kernel(keys, "conv1")[0],
        "widths": widths,
        "in_channels": _kernel(keys, "conv1")[1],
        "num_classes": _classes(keys, "linear"),
    }
    if widths == list(acnet.CIFAR_WIDTHS):
        values |= {"strides": list(acnet.CIFAR_STRIDES), "stem_stride": 1}
    return values


def _row(
    network: str,
    signature: str,
    read: Callable[[Keys, Values], Values],
    make: type[nn.Module],
    named: Mapping[str, Values],
    size: int = 32,
) -> Family:
    def reading(keys: Keys, hints: Values) -> Reading:
        values = read(keys, hints)
        shown = {k: v for k, v in values.items() if k != "in_channels"}
        evidence = f"Keys and shapes of {network} give " + ", ".join(
            f"{name} {value}" for name, value in shown.items()
        )
        assumed = (
            "`strides`, pooling and padding are those of the repository.",
            "The activation is taken to be ReLU and batch norm's eps 1e-5, as in the repository.",
        )
        return Reading(values, (f"{evidence}.",), assumed)

    return Family("acnet", network, re.compile(signature), reading, make, named, size=size)


ROWS = (
    _row("ACNet-CFQK", r"^conv[23]\.acb\.", _quick, acnet.CifarQuick, {"ACNet-CFQKBN": {}}),
    _row("ACNet-VGG", r"^stem\.conv[0-9]+\.acb\.", _vgg, acnet.CifarVGG, {"ACNet-VGG-16": {}}),
    _row(
        "ACNet-SResNet",
        r"^stage[0-9]+\.block[0-9]+\.conv3\.",
        _stage,
        acnet.StageResNet,
        {
            "ACNet-SResNet-50": {"num_blocks": [3, 4, 6, 3]},
            "ACNet-SResNet-101": {"num_blocks": [3, 4, 23, 3]},
            "ACNet-SResNet-152": {"num_blocks": [3, 8, 36, 3]},
        },
        size=224,
    ),
    # After the bottlenecks, whose plain 1x1 layers have the keys of its units.
    _row(
        "ACNet-WRN",
        r"^stage[0-9]+\.block[0-9]+\.conv[12]\.bn\.",
        _wide,
        acnet.WideResNet,
        {"ACNet-WRN-16-8": {}},
    ),
    _row(
        "ACNet-SRC",
        r"^stage[0-9]+\.block[0-9]+\.conv1\.acb\.",
        _cifar,
        acnet.CifarResNet,
        {
            "ACNet-SRC-56": {},
            "ACNet-SRC-110": {"num_blocks": [18, 18, 18]},
            "ACNet-SRC-164": {"num_blocks": [27, 27, 27]},
        },
    ),
    _row(
        "ACNet-ResNet",
        r"^stage[0-9]+\.[0-9]+\.conv1\.acb\.",
        _shortcut,
        acnet.ShortcutResNet,
        {
            "ACNet-ResNet-18": {"num_blocks": [2, 2, 2, 2]},
            "ACNet-ResNet-34": {"num_blocks": [3, 4, 6, 3]},
        },
        size=224,
    ),
    _row(
        "ACNet-MobileNet",
        r"^stem\.[0-9]+\.depthwise\.acb\.",
        _mobile,
        acnet.MobileNet,
        {
            "ACNet-MobileNet": {},
            "ACNet-MobileNet-CIFAR": {
                "stem_width": 16,
                "widths": acnet.CIFAR_WIDTHS,
                "strides": acnet.CIFAR_STRIDES,
                "stem_stride": 1,
            },
        },
        size=224,
    ),
)
