"""Every known network and block; the first row whose signature a file has reads it."""

from __future__ import annotations

from service.networks import (
    acb,
    acnet_keys,
    dbb,
    fastvit,
    mobilenet,
    mobileone,
    orepa_keys,
    repvgg,
    resnet,
    unit_vgg,
)
from service.networks.family import Family

FAMILIES: tuple[Family, ...] = (
    *acnet_keys.ROWS,
    *unit_vgg.ROWS,
    *orepa_keys.ROWS,
    *repvgg.ROWS,
    *dbb.ROWS,
    *acb.ROWS,
    *fastvit.ROWS,
    *mobileone.ROWS,
    *resnet.ROWS,
    *mobilenet.ROWS,
)
