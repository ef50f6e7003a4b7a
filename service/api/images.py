"""From the bytes of an image to a network's input, as the preprocessing of its config says."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from service.errors import BadInput, ImageTooLarge
from service.serving import Levels

FORMATS: Final = {"image/jpeg": "JPEG", "image/png": "PNG", "image/webp": "WEBP"}
IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)
SMALL: Final = 64
"""Inputs whose shorter side is below this many pixels are not cropped by default."""

MAX_SCANS: Final = 64
"""Passes of a progressive JPEG; what programs write has about ten."""

_SCAN: Final = b"\xff\xda"  # compressed data cannot hold it: a zero follows every 0xff in there
_FILTERS: Final = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_CROP_RATIO = 0.875  # 224 / 256, the evaluation transform of ImageNet training
_SPARE = 2.0  # pixels that scaling gets for each that it gives, at least
_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class ImageRecipe:
    """How images become rows: everything that `Preprocessing` leaves open is settled here.

    `shape` is (channels, height, width) with 1 or 3 channels; `resize` the length in pixels to
    which the shorter side is scaled before the central crop to (height, width), which `crop` "none"
    replaces by scaling the whole image; `mean` and `std`
    are per channel, in units of [0, 1]; `origin` says where the values came from.
    """

    shape: tuple[int, int, int]
    resize: int
    crop: str
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channel_order: str
    origin: str

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able form, for the version's resource."""
        return asdict(self)


def recipe(shape: Sequence[int], given: dict[str, Any] | None) -> ImageRecipe | None:
    """The recipe for inputs of `shape` (C, H, W) and the config's `preprocessing` object.

    Without one: three channels get the ImageNet preset (scale the shorter side to input / 0.875,
    crop, normalise), one channel gets grey values in [0, 1]; inputs under `SMALL` pixels are
    scaled to their size without cropping. None when the input is no image (neither 1 nor 3
    channels). Raises BadInput when `mean` or `std` do not have one value per channel.
    """
    if len(shape) != 3 or shape[0] not in _MODES:
        return None
    channels, height, width = shape
    grey = channels == 1
    shorter = min(height, width)
    values = dict(given or {})
    default = shorter if grey or shorter < SMALL else round(shorter / _CROP_RATIO)
    mean = tuple(values.get("mean", IMAGENET_MEAN))
    std = tuple(values.get("std", IMAGENET_STD))
    if grey and (mean, std) == (IMAGENET_MEAN, IMAGENET_STD) and not values.get("preset"):
        mean, std = (0.0,), (1.0,)  # nobody's choice for one channel: the preset left as it is
    return ImageRecipe(
        shape=(channels, height, width),
        resize=values.get("resize") or default,
        crop=values.get("crop", "center"),
        interpolation=values.get("interpolation", "bilinear"),
        mean=_per_channel("mean", mean, channels),
        std=_per_channel("std", std, channels),
        channel_order=values.get("channel_order", "rgb"),
        origin=_origin(values, grey),
    )


def levels(how: ImageRecipe) -> Levels:
    """What a grey level of 0 to 255 becomes in each channel of the network's input."""
    deviation = np.asarray(how.std, dtype=np.float32)
    scale, shift = 1.0 / (255.0 * deviation), np.asarray(how.mean, dtype=np.float32) / deviation
    return Levels(tuple(scale.tolist()), tuple(shift.tolist()))


def normalised(pixels: NDArray[np.uint8], how: ImageRecipe) -> NDArray[np.float32]:
    """Rows [N, C, H, W] from grey levels [N, H, W, C]; looking every level up is cheapest."""
    rows: NDArray[np.float32] = np.empty((len(pixels), *how.shape), np.float32)
    for channel, table in enumerate(_tables(levels(how))):
        np.take(table, pixels[..., channel], out=rows[:, channel], mode="clip")
    return rows


def decode(
    data: bytes | bytearray, how: ImageRecipe, max_pixels: int, max_scans: int = MAX_SCANS
) -> NDArray[np.float32]:
    """One row (C, H, W) from a JPEG, PNG or WebP file; raises what `decode_levels` does."""
    row: NDArray[np.float32]
    (row,) = normalised(decode_levels(data, how, max_pixels, max_scans)[None], how)
    return row


def decode_levels(
    data: bytes | bytearray, how: ImageRecipe, max_pixels: int, max_scans: int = MAX_SCANS
) -> NDArray[np.uint8]:
    """Grey levels (H, W, C) from a JPEG, PNG or WebP file, in the network's order of channels.

    The size is read from the file's head and checked before pixels are decoded. The orientation
    that a camera recorded is applied; transparency is laid over white. A JPEG several times as
    large as needed is decoded at a half, a quarter or an eighth of its size, never below `_SPARE`
    times what it is scaled to; that moves the pixels by less than a grey level on average. Raises
    BadInput for bytes that are no such image and ImageTooLarge beyond `max_pixels`, or for a JPEG
    of more than `max_scans` scans: each is a pass over all pixels, and a few bytes ask for it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # oddities in metadata are no reason to refuse
            with Image.open(io.BytesIO(data), formats=list(FORMATS.values())) as image:
                if image.width * image.height > max_pixels:
                    raise ImageTooLarge(
                        f"The image has {image.width} x {image.height} pixels; "
                        f"at most {max_pixels} are decoded.",
                        limit=max_pixels,
                    )
                if image.format == "JPEG" and (scans := data.count(_SCAN)) > max_scans:
                    raise ImageTooLarge(
                        f"The JPEG has {scans} scans; at most {max_scans} are decoded.",
                        remedy="Save it again, or raise FOLDSERVE_MAX_IMAGE_SCANS.",
                        limit=max_scans,
                    )
                _decode_no_larger_than_needed(image, how)
                return _to_levels(_in_mode(image, _MODES[how.shape[0]]), how)
    except ImageTooLarge:
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(str(error)) from None
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError) as error:
        raise BadInput(
            f"The image cannot be decoded: {type(error).__name__}.",
            remedy="Send an undamaged JPEG, PNG or WebP file.",
        ) from error


def _decode_no_larger_than_needed(image: Image.Image, how: ImageRecipe) -> None:
    """Let the JPEG decoder leave out the detail that scaling would average away."""
    if how.interpolation == "nearest":
        return
    enough = _SPARE * max(how.resize, *how.shape[1:])
    factor = enough / min(image.size)
    if factor < 1:  # other formats take no notice
        image.draft(None, (math.ceil(image.width * factor), math.ceil(image.height * factor)))


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    ImageOps.exif_transpose(image, in_place=True)  # a copy only where there is something to turn
    if image.mode.startswith("I"):  # 16-bit grey: Pillow would clip it to white
        wide = np.asarray(image, dtype=np.float32) / 257.0
        return Image.fromarray(np.clip(wide, 0, 255).round().astype(np.uint8)).convert(mode)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert(mode)
    return image if image.mode == mode else image.convert(mode)


def _to_levels(image: Image.Image, how: ImageRecipe) -> NDArray[np.uint8]:
    channels, height, width = how.shape
    values = np.asarray(_scale_and_crop(image, how)).reshape(height, width, channels)
    return in_order(values, how)


def in_order(pixels: NDArray[np.uint8], how: ImageRecipe) -> NDArray[np.uint8]:
    """RGB or grey pixels [..., C] in the network's order of channels."""
    return pixels[..., ::-1] if how.channel_order == "bgr" else pixels


@lru_cache(256)
def _tables(of: Levels) -> NDArray[np.float32]:
    """What each grey level becomes in each channel, [channels, 256]."""
    scale, shift = np.asarray(of.scale, np.float32), np.asarray(of.shift, np.float32)
    grey = np.arange(256, dtype=np.float32)[:, None]
    return np.ascontiguousarray((grey * scale - shift).T, dtype=np.float32)


def _scale_and_crop(image: Image.Image, how: ImageRecipe) -> Image.Image:
    """Scale the shorter side to `resize` (or until it covers) and cut out the middle, in one step.

    The crop is mapped back into the source and only it is resampled: the pixels are those of
    scaling first, and an image of 1 x 50,000,000 pixels cannot make a giant in between.
    """
    _, height, width = how.shape
    if how.crop == "none":
        return image.resize((width, height), _FILTERS[how.interpolation])
    shorter = min(image.width, image.height)
    covering = max(width * shorter / image.width, height * shorter / image.height)
    resize = max(how.resize, math.ceil(covering))
    wide = max(width, int(resize * image.width / shorter))
    high = max(height, int(resize * image.height / shorter))
    left, top = round((wide - width) / 2), round((high - height) / 2)
    across, down = image.width / wide, image.height / high
    box = (
        left * across,
        top * down,
        min((left + width) * across, image.width),
        min((top + height) * down, image.height),
    )
    return image.resize((width, height), _FILTERS[how.interpolation], box=box)


def _origin(values: dict[str, Any], grey: bool) -> str:
    if values.get("preset"):
        return f"preset {values['preset']}"
    return "config" if values else "grey in [0, 1]" if grey else "ImageNet preset"


def _per_channel(name: str, values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return values
    if len(values) == 1:
        return values * channels
    raise BadInput(
        f"`preprocessing.{name}` has {len(values)} values; the model takes {channels} channels.",
        remedy="Give one value, or one per channel.",
    )
