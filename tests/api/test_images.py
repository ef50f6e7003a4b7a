from __future__ import annotations

import io
import struct
import time
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from service.api.images import IMAGENET_MEAN, IMAGENET_STD, ImageRecipe, decode, recipe
from service.errors import BadInput, ImageTooLarge

MANY = 10**7


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> Image.Image:
    shape = (height, width, channels) if channels > 1 else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def settled(shape: tuple[int, int, int], **given: object) -> ImageRecipe:
    how = recipe(shape, dict(given) or None)
    assert how is not None
    return how


def textbook(image: Image.Image, how: ImageRecipe) -> NDArray[np.float32]:
    """Scale, then crop, then normalise: each step for itself, as evaluation scripts do."""
    channels, height, width = how.shape
    shorter = min(image.size)
    size = (
        int(how.resize * image.width / shorter),
        int(how.resize * image.height / shorter),
    )
    image = image.convert("L" if channels == 1 else "RGB")
    scaled = image.resize(size, Image.Resampling.BILINEAR)
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    cropped = scaled.crop((left, top, left + width, top + height))
    values = np.asarray(cropped, dtype=np.float64).reshape(height, width, channels) / 255
    return ((values - how.mean) / how.std).transpose(2, 0, 1).astype(np.float32)


@pytest.mark.parametrize("size", [(300, 400), (500, 260), (256, 256), (97, 411)])
def test_one_step_equals_scaling_then_cropping(size: tuple[int, int]) -> None:
    image, how = noise(*size), settled((3, 224, 224))
    assert how.resize == 256
    found, truth = decode(png(image), how, MANY), textbook(image, how)
    step = 1 / 255 / min(IMAGENET_STD)  # one grey level, which is where Pillow rounds
    assert found.shape == (3, 224, 224)
    assert found.dtype == np.float32
    assert np.abs(found - truth).max() < 1.5 * step
    assert np.abs(found - truth).mean() < 0.5 * step
    # The control: a crop one pixel aside is something else.
    assert np.abs(found[:, :, 1:] - truth[:, :, :-1]).mean() > step


def test_mean_and_std_are_applied_per_channel() -> None:
    grey = Image.new("RGB", (20, 20), (51, 102, 204))
    how = settled((3, 10, 10), mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 0.125])
    row = decode(png(grey), how, MANY)
    assert np.allclose(row[:, 0, 0], [(0.2 - 0.1) / 0.5, (0.4 - 0.2) / 0.25, (0.8 - 0.3) / 0.125])
    turned = settled((3, 10, 10), mean=[0.0], std=[1.0], channel_order="bgr")
    assert np.allclose(decode(png(grey), turned, MANY)[:, 0, 0], [0.8, 0.4, 0.2])


def test_defaults_by_shape() -> None:
    imagenet = settled((3, 224, 224))
    assert (imagenet.resize, imagenet.mean, imagenet.std) == (256, IMAGENET_MEAN, IMAGENET_STD)
    small = settled((3, 32, 32))
    assert (small.resize, small.mean) == (32, IMAGENET_MEAN)
    digits = settled((1, 8, 8))
    assert (digits.resize, digits.mean, digits.std) == (8, (0.0,), (1.0,))
    assert settled((3, 32, 32), resize=40, mean=[0.5], std=[0.5]).mean == (0.5, 0.5, 0.5)
    assert recipe((8, 9, 12), None) is None
    assert recipe((10,), None) is None


def test_one_channel_is_grey_from_zero_to_one() -> None:
    ramp = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    row = decode(png(ramp), settled((1, 8, 8)), MANY)
    assert np.allclose(row[0], np.arange(64).reshape(8, 8) * 4 / 255)


def test_sixteen_bits_are_not_clipped() -> None:
    ramp = Image.fromarray((np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8))
    row = decode(png(ramp), settled((1, 8, 8)), MANY)
    assert np.allclose(row[0], np.arange(64).reshape(8, 8) * 1000 / 65535, atol=1 / 255)


def test_transparency_lies_over_white() -> None:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    row = decode(png(clear), settled((3, 8, 8), mean=[0.0], std=[1.0]), MANY)
    assert np.allclose(row, 1.0)


def test_the_cameras_orientation_is_applied() -> None:
    upright = noise(12, 24)
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG", exif=exif)
    how = settled((3, 12, 12))
    assert np.allclose(decode(buffer.getvalue(), how, MANY), decode(png(upright), how, MANY))


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (1, 1)])
def test_extreme_shapes_cost_no_more_than_others(size: tuple[int, int]) -> None:
    row = decode(png(Image.new("RGB", size, "white")), settled((3, 32, 32)), MANY)
    assert row.shape == (3, 32, 32)
    assert np.allclose(row[0], (1 - IMAGENET_MEAN[0]) / IMAGENET_STD[0], atol=1e-5)


def test_a_resize_below_the_input_still_covers_it() -> None:
    row = decode(png(Image.new("RGB", (50, 80), "white")), settled((3, 40, 32), resize=8), MANY)
    assert row.shape == (3, 40, 32)


def bomb(width: int, height: int) -> bytes:
    """A PNG whose head claims pixels that its few bytes do not hold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        tail = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + tail

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(4000, 4000), (100_000, 100_000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_by_its_head(size: tuple[int, int]) -> None:
    with pytest.raises((ImageTooLarge, BadInput)) as caught:
        decode(bomb(*size), settled((3, 32, 32)), 10**6)
    if size == (4000, 4000):
        assert isinstance(caught.value, ImageTooLarge)
        assert caught.value.extra["limit"] == 10**6


@pytest.mark.parametrize(
    "data", [b"", b"no image", png(noise(20, 20))[:100], b"\xff\xd8\xff\xe0" + bytes(50)]
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(BadInput):
        decode(data, settled((3, 8, 8)), MANY)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_other_formats_are_refused(kind: str) -> None:
    buffer = io.BytesIO()
    noise(10, 10).save(buffer, kind)
    with pytest.raises(BadInput):
        decode(buffer.getvalue(), settled((3, 8, 8)), MANY)


def test_a_preset_that_does_not_fit_the_channels_is_refused() -> None:
    with pytest.raises(BadInput, match="mean"):
        recipe((1, 8, 8), {"mean": [0.1, 0.2, 0.3]})


def test_without_a_crop_the_whole_image_is_seen() -> None:
    image = Image.new("RGB", (64, 16), "black")
    image.paste("white", (48, 0, 64, 16))  # the right quarter, outside a central crop
    how = settled((3, 16, 16), crop="none", mean=[0.0], std=[1.0], interpolation="nearest")
    row = decode(png(image), how, MANY)
    assert row[:, :, :12].max() == 0
    assert row[:, :, 12:].min() == 1
    cropped = settled((3, 16, 16), mean=[0.0], std=[1.0], interpolation="nearest")
    assert decode(png(image), cropped, MANY).max() == 0


def photograph(width: int, height: int) -> bytes:
    """A JPEG of smooth shapes under fine noise, as cameras make them."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (height // 12, width // 12, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth) + random.normal(0, 6, (height, width, 3))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(500, 375), (1080, 1920), (1600, 1200)])
def test_a_photograph_decoded_smaller_stays_within_a_grey_level(size: tuple[int, int]) -> None:
    data, how = photograph(*size), settled((3, 224, 224))
    found, truth = decode(data, how, MANY), textbook(Image.open(io.BytesIO(data)), how)
    level = 1 / 255 / min(IMAGENET_STD)
    assert np.abs(found - truth).mean() < level
    assert np.abs(found - truth).max() < 12 * level
    # The control: a crop one pixel aside is farther away.
    assert np.abs(found[:, :, 1:] - truth[:, :, :-1]).mean() > 1.5 * level


def test_large_photographs_are_not_decoded_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def watched(self: Image.Image, *arguments: object, **named: object) -> Image.Image:
        decoded.append(self.size)
        return resize(self, *arguments, **named)

    data = photograph(1600, 1200)
    monkeypatch.setattr(Image.Image, "resize", watched)
    decode(data, settled((3, 224, 224)), MANY)
    decode(data, settled((3, 224, 224), interpolation="nearest"), MANY)
    assert decoded == [(800, 600), (1600, 1200)]


def scans(times: int, side: int = 1000) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    buffer = io.BytesIO()
    noise(side, side).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + data[last:end] * times + data[end:]


def test_a_jpeg_of_a_thousand_passes_is_refused() -> None:
    how = settled((3, 32, 32))
    with pytest.raises(ImageTooLarge, match="scans"):
        decode(scans(1000, 64), how, MANY)
    assert decode(scans(20, 64), how, MANY).shape == (3, 32, 32)


def test_every_pass_costs() -> None:
    """The control: without the limit the file that is refused keeps a core busy."""
    how = settled((3, 512, 512))

    def seconds(times: int) -> float:
        data = scans(times, 600)
        began = time.process_time()
        decode(data, how, MANY, max_scans=10_000)
        return time.process_time() - began

    assert seconds(300) > 5 * seconds(0)
