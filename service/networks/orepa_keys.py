"""Recognising bare OREPA blocks."""

from __future__ import annotations

import re

from service.networks.family import Family, Reading, Values
from service.networks.keys import Keys, ratio, show
from service.networks.orepa import EXPANSION, OREPA, OREPA1x1, OREPALarge, OREPARepVGGBlock

_STRIDE = "`stride` is taken to be 1, which the keys do not tell."
_PADDING = "`padding` is half the kernel."
_ACT = "`act` is taken to be none and batch norm's eps 1e-5, as in the repository."


def _channels(keys: Keys, weight: str, depthwise: str, hints: Values) -> Values:
    """Channels, kernel and groups: the depthwise kernel is as long as the input is wide."""
    out, fan, size, _ = keys.shape(weight)
    if depthwise in keys:
        groups = ratio(keys.shape(depthwise)[0] // EXPANSION, fan)
    else:
        groups = hints.get("groups") or ratio(hints.get("in_channels", fan), fan)
    return {
        "in_channels": fan * groups,
        "out_channels": out,
        "kernel_size": size,
        "groups": groups,
    }


def _read_dense(keys: Keys, hints: Values) -> Reading:
    weight = _first(keys, "weight_orepa_origin", "orepa_reparam.weight")
    values = _channels(keys, weight, "weight_orepa_gconv_dw", hints)
    evidence = f"`{weight}` is {show(keys.shape(weight))}, in {values['groups']} groups."
    return Reading(values, (evidence,), (_STRIDE, _PADDING, _ACT))


def _read_point(keys: Keys, hints: Values) -> Reading:
    weight = _first(keys, "weight_or1x1_origin", "or1x1_reparam.weight")
    out, inner, *_ = keys.shape(weight)
    evidence = f"`{weight}` is {show(keys.shape(weight))}."
    return Reading({"in_channels": inner, "out_channels": out}, (evidence,), (_STRIDE, _ACT))


def _read_large(keys: Keys, hints: Values) -> Reading:
    if keys.any("or_large_reparam."):
        values = _channels(keys, "or_large_reparam.weight", "", hints)
        return Reading(values, ("`or_large_reparam` exists.",), (_STRIDE, _PADDING, _ACT))
    layers = keys.count("weight")
    squeezed = keys.any("weight0.")
    weight = "weight0.weight_orepa_origin" if squeezed else "weight0"
    values = _channels(keys, weight, "weight0.weight_orepa_gconv_dw", hints)
    values |= {"kernel_size": 2 * layers + 1, "squeezed": squeezed}
    size = values["kernel_size"]
    evidence = f"{layers} kernels of 3x3 compose to one of {size}x{size}."
    return Reading(values, (evidence,), (_STRIDE, _PADDING, _ACT))


def _read_repvgg(keys: Keys, hints: Values) -> Reading:
    weight = _first(keys, "rbr_dense.weight_rbr_origin", "rbr_1x1.conv.weight")
    values = _channels(keys, weight, "rbr_dense.weight_rbr_gconv_dw", hints)
    identity = keys.any("rbr_identity.")
    values |= {"kernel_size": 3, "identity": identity, "stride": 1 if identity else 2}
    evidence = f"`{weight}` is {show(keys.shape(weight))}: RepVGG's block, squeezed online."
    act = "`act` is taken to be ReLU and batch norm's eps 1e-5, as in the repository."
    stride = f"`stride` is taken to be {values['stride']}, by the identity branch."
    return Reading(values, (evidence,), (stride, act))


def _first(keys: Keys, *candidates: str) -> str:
    return next((key for key in candidates if key in keys), candidates[0])


ROWS = (
    Family(
        family="orepa",
        network="OREPA",
        signature=re.compile(r"^(weight_orepa_|orepa_reparam\.)"),
        read=_read_dense,
        make=OREPA,
        size=32,
    ),
    Family(
        family="orepa",
        network="OREPA_1x1",
        signature=re.compile(r"^(weight_or1x1_|or1x1_reparam\.)"),
        read=_read_point,
        make=OREPA1x1,
        size=32,
    ),
    Family(
        family="orepa",
        network="OREPA_LargeConv",
        signature=re.compile(r"^(weight[0-9](\.|$)|or_large_reparam\.)"),
        read=_read_large,
        make=OREPALarge,
        size=32,
    ),
    Family(
        family="orepa",
        network="RepVGGBlock_OREPA",
        signature=re.compile(r"^rbr_dense\.weight_rbr_"),
        read=_read_repvgg,
        make=OREPARepVGGBlock,
        size=32,
    ),
)
