"""Every known network and block; the first row whose signature a file has reads it."""

from __future__ import annotations

from service.networks import dbb, mobilenet, repvgg, resnet
from service.networks.family import Family

FAMILIES: tuple[Family, ...] = (
    *repvgg.ROWS,
    *dbb.ROWS,
    *resnet.ROWS,
    *mobilenet.ROWS,
)
