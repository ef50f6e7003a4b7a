"""What an uploader may say beside the checkpoint: the `config` JSON, checked into `ModelConfig`."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from service.errors import InvalidConfig, UnsafeLabel
from service.networks.presets import PRESETS

CHANGEABLE = frozenset({"labels", "preprocessing"})
"""Fields of a config that say how answers look, not what is computed."""

Extent = Annotated[int, Field(ge=1, le=8192)]
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the network's input.

    The image is scaled so that its shorter side has `resize` pixels (None: the input size divided
    by 0.875), cropped in the middle to the input size, divided by 255, and normalised as
    (value - mean) / std per channel. One number in `mean` or `std` holds for every channel. With
    `crop` "none" the whole image is scaled to the input size, whatever its proportions.

    In JSON, `preset` names a row of `PRESETS` whose values hold where no other is given, and the
    name alone stands for the object; what is kept are the values and where they came from.
    """

    __pydantic_config__ = _STRICT

    preset: str | None = None
    resize: Extent | None = None
    crop: Literal["center", "none"] = "center"
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[Annotated[float, Field(gt=0)], ...] = (0.229, 0.224, 0.225)
    channel_order: Literal["rgb", "bgr"] = "rgb"


@dataclass(frozen=True)
class ModelConfig:
    """The checked config of one upload; every field may be left out.

    `architecture` is a name, or an object with `name` and constructor values that the keys cannot
    tell, as in `{"name": "RepVGG", "stem_stride": 1}`. `input_shape` is (channels, height, width),
    or of another rank where the network takes one; the batch axis is left out.
    """

    __pydantic_config__ = _STRICT

    architecture: str | dict[str, Any] | None = None
    input_shape: Annotated[tuple[Extent, ...], Field(min_length=1, max_length=4)] | None = None
    preprocessing: Preprocessing | None = None
    labels: tuple[str, ...] | None = None
    weights: Literal["model", "ema"] = "model"
    backend: Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,32}$")] = "auto"
    precision: Literal["auto", "float32", "tf32", "bfloat16", "float16", "int8"] = "auto"

    @staticmethod
    def from_json(text: str | bytes) -> ModelConfig:
        """Parse and check JSON; empty text is the empty config.

        Raises InvalidConfig naming the first wrong field in `field` and its reason in the detail,
        UnsafeLabel for a label with control or text-direction characters.
        """
        try:
            config = _ADAPTER.validate_json(_with_presets(text or b"{}"))
        except ValidationError as error:
            raise _invalid(error) from None
        config.requested()
        for index, label in enumerate(config.labels or ()):
            if any(map(_misleads, label)):
                raise UnsafeLabel(
                    f"`labels.{index}` is {label[:80]!a}, which holds characters that cannot be "
                    "shown.",
                    field=f"labels.{index}",
                )
        return config

    def to_json(self) -> str:
        """JSON that `from_json` turns back into an equal config."""
        return _ADAPTER.dump_json(self).decode()

    def requested(self) -> Requested:
        """The architecture that the uploader names, if any. Raises InvalidConfig without a name."""
        if self.architecture is None or isinstance(self.architecture, str):
            return Requested(self.architecture)
        values = dict(self.architecture)
        name = values.pop("name", None)
        if isinstance(name, str):
            return Requested(name, values)
        raise InvalidConfig(
            "`architecture.name` is missing: an object must name its architecture.",
            remedy='Write a name, or {"name": "RepVGG", ...} with constructor values beside it.',
            field="architecture.name",
        )


def parse_changes(text: str | bytes) -> ModelConfig:
    """The fields that may be changed once a version is there: `labels` and `preprocessing`.

    null takes a field back. Raises InvalidConfig, also for any other field and for none.
    """
    config = ModelConfig.from_json(text)
    given = json.loads(text or b"{}")
    wrong = sorted(given.keys() - CHANGEABLE)
    if wrong or not given:
        raise InvalidConfig(
            f"`{wrong[0]}` is settled once a version is converted."
            if wrong
            else "Nothing is given.",
            remedy="Change `labels` or `preprocessing`; for anything else upload a new version.",
            field=wrong[0] if wrong else "config",
        )
    return config


@dataclass(frozen=True)
class Requested:
    """A network named by the uploader and the constructor values that they fix."""

    name: str | None = None
    values: dict[str, Any] = field(default_factory=dict)


def _misleads(character: str) -> bool:
    """Whether a character is none to see, but changes lines, direction or what a program reads.

    The two joiners are part of how words and emoji are written.
    """
    kind = unicodedata.category(character)
    return kind in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in "\u200c\u200d"


_ADAPTER = TypeAdapter(ModelConfig)


def _with_presets(text: str | bytes) -> str | bytes:
    """The JSON with the values of the preset that it names, if it names one."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return text  # the parser proper says what is wrong with it
    given = data.get("preprocessing") if isinstance(data, dict) else None
    asked = {"preset": given} if isinstance(given, str) else given
    if not isinstance(asked, dict) or asked.get("preset") is None:
        return text
    name = asked["preset"]
    if not isinstance(name, str) or name not in PRESETS:
        raise InvalidConfig(
            f"`preprocessing.preset` is {str(name)[:40]!r}, which is no preset.",
            remedy=f"Use one of {', '.join(PRESETS)}, or give the values themselves.",
            field="preprocessing.preset",
        )
    return json.dumps(data | {"preprocessing": {**PRESETS[name], **asked}})


def _invalid(error: ValidationError) -> InvalidConfig:
    first = error.errors(include_url=False, include_input=False)[0]
    # Branches of a union add their own names to the location; those are no fields of the config.
    place = ".".join(str(part) for part in first["loc"] if "[" not in str(part)) or "config"
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = ", ".join(f"`{name}`" for name in ModelConfig.__dataclass_fields__)
        return InvalidConfig(
            f"`{place}` is not a field of config.", remedy=f"Known fields: {known}.", field=place
        )
    return InvalidConfig(f"`{place}`: {first['msg']}.", field=place)
