"""Named ways to preprocess an image, as training recipes have them: values of `Preprocessing`.

`mean` and `std` are per channel in units of [0, 1], in the order of `channel_order`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_CAFFE_MEAN = (103.939 / 255, 116.779 / 255, 123.68 / 255)

PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "imagenet": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    "imagenet-bicubic": {
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "interpolation": "bicubic",
    },
    "inception": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic"},
    "clip": {
        "mean": (0.48145466, 0.4578275, 0.40821073),
        "std": (0.26862954, 0.26130258, 0.27577711),
        "interpolation": "bicubic",
    },
    # Pixels from 0 to 255 less their mean, blue first.
    "caffe": {"mean": _CAFFE_MEAN, "std": (1 / 255,) * 3, "channel_order": "bgr"},
    "cifar10": {
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "crop": "none",
    },
    "cifar100": {
        "mean": (0.5071, 0.4865, 0.4409),
        "std": (0.2673, 0.2564, 0.2762),
        "crop": "none",
    },
    "mnist": {"mean": (0.1307,), "std": (0.3081,), "crop": "none"},
    "unit": {"mean": (0.0,), "std": (1.0,)},
}
"""Name -> the fields that differ from the defaults; one value holds for every channel."""
