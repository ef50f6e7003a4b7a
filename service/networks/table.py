"""Every known network and block; the first row whose signature a file has reads it."""

from __future__ import annotations

from service.networks import (
    acb,
    acnet_keys,
    dbb,
    detectors,
    ecbsr,
    efficientvit,
    fastvit,
    inception,
    levit,
    mobilenet,
    mobileone,
    orepa_keys,
    qarepvgg,
    repghost,
    replknet,
    repvgg,
    repvit,
    resnet,
    unireplknet,
    unit_vgg,
)
from service.networks.family import Family

FAMILIES: tuple[Family, ...] = (
    *acnet_keys.ROWS,
    *unit_vgg.ROWS,
    *orepa_keys.ROWS,
    *inception.ROWS,
    *levit.ROWS,
    *efficientvit.ROWS,
    *detectors.ROWS,
    *qarepvgg.ROWS,
    *ecbsr.ROWS,
    *repvgg.ROWS,
    *dbb.ROWS,
    *acb.ROWS,
    *fastvit.ROWS,
    *replknet.ROWS,
    *unireplknet.ROWS,
    *repghost.ROWS,
    *repvit.ROWS,
    *mobileone.ROWS,
    *resnet.ROWS,
    *mobilenet.ROWS,
)
