"""A client of a running Foldserve: `Client` blocks, `AsyncClient` awaits, both do the same.

>>> from service.client import Client
>>> with Client(url) as client:
...     version = client.upload("RepVGG-A0-train.pth", "repvgg-a0", wait=120)
...     labels = client.predict("repvgg-a0", "cat.jpg", top_k=3)
>>> version.state, version.fusion["fused"]
('ready', 5)
>>> [len(row) for row in labels]
[3]

An upload tells how far it is, and its conversion what it does:

>>> client = Client(url)
>>> sent = []
>>> version = client.upload("RepVGG-A0-train.pth", progress=lambda done, of: sent.append(done / of))
>>> sent[-1]
1.0
>>> [event["data"]["state"] for event in client.events(version) if event["event"] == "state"]
['queued', 'converting', 'ready']

Inputs are paths, bytes of image files, PIL images, arrays, or several of them:

>>> import numpy as np
>>> client.infer("repvgg-a0", np.zeros((2, 3, 224, 224), np.float32)).shape
(2, 12)
>>> from PIL import Image
>>> rows = client.predict("repvgg-a0", ["cat.jpg", Image.open("cat.jpg")], top_k=1)
>>> rows[0][0].index == rows[1][0].index
True

A refusal is raised as the service's own error (`service.errors`), with its detail and remedy:

>>> client.version("repvgg-a0", 99)
Traceback (most recent call last):
service.errors.VersionNotFound: ...

Busy answers (429, 503) are repeated after the time that the service asks for, and after growing
pauses where it names none.

>>> client.close()
"""

from __future__ import annotations

from service.client.awaiting import AsyncClient
from service.client.blocking import Client
from service.client.operations import API_KEY_VARIABLE, model_name
from service.client.types import DEFAULT_URL, Form, Format, Json, Label, Transferred, Version

__all__ = [
    "API_KEY_VARIABLE",
    "DEFAULT_URL",
    "AsyncClient",
    "Client",
    "Form",
    "Format",
    "Json",
    "Label",
    "Transferred",
    "Version",
    "model_name",
]
