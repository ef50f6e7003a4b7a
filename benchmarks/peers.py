"""The other servers: where they are installed, how they are started, what they are sent.

    python -m benchmarks.peers install [NAME ...]   make or complete their environments
    python -m benchmarks.peers list                 say which are there

Every peer has an environment of its own, outside this project, because their dependencies disagree
with each other and with this project's. They see the packages of the interpreter that installs
them and take from there what fits, above all its PyTorch: all run the same one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from benchmarks.workload import Body, Floats, Sample, http_request, json_request

_RAW = "application/octet-stream"


@dataclass(frozen=True)
class Peer:
    """A server: its packages, its app in `peer_apps`, and its side of the protocol.

    `encode` makes a whole HTTP request of a sample, or None for a body that the server does not
    take; `decode` reads the logits from an answer's body. A peer `isolated` gets a network
    namespace of its own, because it listens on more than loopback.
    """

    name: str
    app: str
    about: str
    packages: tuple[str, ...]
    encode: Callable[[Body, Sample], bytes | None]
    decode: Callable[[bytes], Floats]
    shown: str = ""
    dependencies: bool = True
    isolated: bool = False

    def interpreter(self, folder: Path) -> Path:
        """Its Python; this one's for a peer without packages of its own."""
        return folder / self.name / "bin" / "python" if self.packages else Path(sys.executable)

    def version(self, folder: Path) -> str:
        """The version of its package. Raises what the reason is when it is not there."""
        name = self.shown or self.name
        if not self.packages:
            return version(name)
        code = f"from importlib.metadata import version; print(version({name!r}))"
        python = self.interpreter(folder)
        if not python.exists():
            raise LookupError("not installed: `python -m benchmarks.peers install`")
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
        if done.returncode:
            raise LookupError(_reason(folder / self.name / "install.log"))
        return done.stdout.strip()


def home() -> Path:
    """Where the environments are unless a command says otherwise."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "foldserve" / "peers"


def _leanest(body: Body, sample: Sample) -> bytes | None:
    if body == "json":
        content = json.dumps({"inputs": sample.nested}).encode()
    else:
        content = sample.raw if body == "binary" else sample.photo
    return http_request("/predict", content, content_type=_RAW)


def _raw_logits(body: bytes) -> Floats:
    return np.frombuffer(body, np.float32)


def _mlserver(body: Body, sample: Sample) -> bytes | None:
    tensor: dict[str, Any] = {"name": "input"}
    if body == "json":
        tensor |= {"datatype": "FP32", "shape": [1, *sample.row.shape], "data": sample.nested}
    else:
        data = sample.base64 if body == "binary" else sample.photo64
        tensor |= {"datatype": "BYTES", "shape": [1, 1], "data": [data]}
        tensor["parameters"] = {"content_type": "base64"}
    return json_request("/v2/models/model/infer", {"inputs": [tensor]})


def _v2_logits(body: bytes) -> Floats:
    return np.asarray(orjson.loads(body)["outputs"][0]["data"], np.float32)


def _bentoml(body: Body, sample: Sample) -> bytes | None:
    if body == "json":
        return json_request("/arrays", {"rows": sample.nested})
    data = sample.base64 if body == "binary" else sample.photo64
    return json_request("/encoded", {"rows": [data]})


def _bentoml_logits(body: bytes) -> Floats:
    return np.asarray(orjson.loads(body), np.float32).reshape(-1)


def _triton(body: Body, sample: Sample) -> bytes | None:
    path = "/v2/models/model/infer"
    tensor: dict[str, Any] = {"name": "input", "datatype": "FP32", "shape": [1, *sample.row.shape]}
    if body == "json":
        return json_request(path, {"inputs": [tensor | {"data": sample.nested}]})
    if body == "jpeg":
        return None
    tensor["parameters"] = {"binary_data_size": len(sample.raw)}
    parameters = {"binary_data_output": True}
    head = json.dumps({"inputs": [tensor], "parameters": parameters}).encode()
    return http_request(
        path,
        head + sample.raw,
        content_type=_RAW,
        inference_header_content_length=str(len(head)),
    )


def _triton_logits(body: bytes) -> Floats:
    if body.endswith(b"]}"):
        try:
            return _v2_logits(body)
        except ValueError:
            pass
    end = body.rindex(b"}") + 1
    while True:  # the JSON head ends at a brace, and the elements may hold the same byte
        try:
            orjson.loads(body[:end])
        except ValueError:
            end = body.rindex(b"}", 0, end - 1) + 1
        else:
            return np.frombuffer(body[end:], np.float32)


PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            "fastapi",
            "fastapi_app",
            "uvicorn with uvloop and httptools, one process, the model called in the route",
            (),
            _leanest,
            _raw_logits,
        ),
        Peer(
            "litserve",
            "litserve_app",
            "max_batch_size=32, batch_timeout=1 ms, fast_queue, one worker",
            ("litserve",),
            _leanest,
            _raw_logits,
        ),
        Peer(
            "mlserver",
            "mlserver_app",
            "adaptive batching (32, 1 ms), model in the server's process; base64 within JSON",
            ("mlserver",),
            _mlserver,
            _v2_logits,
        ),
        Peer(
            "bentoml",
            "bentoml_app",
            "adaptive batching (32), one worker; base64 within JSON",
            ("bentoml",),
            _bentoml,
            _bentoml_logits,
        ),
        Peer(
            "ray",
            "ray_app",
            "Ray Serve, @serve.batch (32, 1 ms), one replica",
            ("ray[serve]",),
            _leanest,
            _raw_logits,
            isolated=True,
        ),
        Peer(
            "triton",
            "triton_app",
            "Python backend, dynamic batching, one CPU instance; binary tensor extension",
            ("nvidia-pytriton", "numpy<2"),
            _triton,
            _triton_logits,
            shown="nvidia-pytriton",
            dependencies=False,  # only the server in its wheel is used, not its Python interface
        ),
    )
}


def install(peer: Peer, folder: Path) -> str:
    """Make the peer's environment; answers its version, or the reason why there is none."""
    if not peer.packages:
        return peer.version(folder)
    home = folder / peer.name
    if not peer.interpreter(folder).exists():
        venv.create(home, with_pip=True)
    (site,) = home.glob("lib/python*/site-packages")
    shared = [path for path in sys.path if path.endswith("site-packages")]
    (site / "shared.pth").write_text("".join(f"{path}\n" for path in shared))
    constraints = home / "constraints.txt"
    constraints.write_text(f"torch=={version('torch').split('+')[0]}\n")
    command = [str(peer.interpreter(folder)), "-m", "pip", "install", "-q", "-c", str(constraints)]
    command += [] if peer.dependencies else ["--no-deps"]
    with (home / "install.log").open("w") as log:
        subprocess.run([*command, *peer.packages], stdout=log, stderr=subprocess.STDOUT)
    try:
        return peer.version(folder)
    except LookupError as error:
        return str(error)


def _reason(log: Path) -> str:
    lines = log.read_text().splitlines() if log.exists() else []
    errors = [line for line in lines if line.startswith("ERROR")]
    return f"not installed: {errors[-1][:200]}" if errors else "not installed"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; answers the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["install", "list"])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(PEERS)}; all if none is named")
    parser.add_argument("--folder", type=Path, default=home(), help="where they are installed")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(PEERS)
    if unknown:
        parser.error(f"unknown peers: {', '.join(sorted(unknown))}")
    for name in options.names or PEERS:
        peer = PEERS[name]
        if options.action == "install":
            found = install(peer, options.folder)
        else:
            try:
                found = peer.version(options.folder)
            except LookupError as error:
                found = str(error)
        print(f"{name:10} {found}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
