"""Triton with its Python backend, dynamic batching and the binary tensor extension.

The server itself comes from the wheel of `nvidia-pytriton`; this builds its model repository and
replaces this process by it. The model runs in the backend's own process.
"""

from __future__ import annotations

import os
import site
import sys
from pathlib import Path
from tempfile import mkdtemp

from benchmarks.workload import NETWORKS

CONFIG = """
name: "model"
backend: "python"
max_batch_size: 32
input [ {{ name: "input" data_type: TYPE_FP32 dims: [ {dims} ] }} ]
output [ {{ name: "logits" data_type: TYPE_FP32 dims: [ -1 ] }} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
dynamic_batching {{ }}
parameters: {{ key: "folder" value: {{ string_value: "{folder}" }} }}
"""
MODEL = """
import json
import sys
from pathlib import Path

sys.path += {paths!r}
import numpy as np
import triton_python_backend_utils as backend

from benchmarks.workload import Deployed


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.model = Deployed(Path(config["parameters"]["folder"]["string_value"]))

    def execute(self, requests):
        inputs = [backend.get_input_tensor_by_name(each, "input").as_numpy() for each in requests]
        logits = self.model(np.concatenate(inputs))
        parts = np.split(logits, np.cumsum([len(each) for each in inputs])[:-1])
        return [
            backend.InferenceResponse([backend.Tensor("logits", np.ascontiguousarray(part))])
            for part in parts
        ]
"""


def main() -> None:
    folder, port = Path(sys.argv[1]), int(sys.argv[2])
    network = NETWORKS[(folder / "network").read_text().strip()]
    repository = Path(mkdtemp(dir=folder))
    version = repository / "model" / "1"
    version.mkdir(parents=True)
    paths = [os.getcwd(), *(path for path in sys.path if path)]
    (version / "model.py").write_text(MODEL.replace("{paths!r}", repr(paths)))
    dims = ", ".join(map(str, network.shape))
    (repository / "model" / "config.pbtxt").write_text(CONFIG.format(dims=dims, folder=folder))
    home = _installed()
    backends = folder / "triton-backends" / "python"
    backends.mkdir(parents=True)
    for file in (home / "backends" / "python").iterdir():
        (backends / file.name).symlink_to(file)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = home / "python_backend_stubs" / python / "triton_python_backend_stub"
    (backends / stub.name).symlink_to(stub)
    libraries = [str(home.parent.parent / "nvidia_pytriton.libs"), f"{sys.base_prefix}/lib"]
    os.environ["LD_LIBRARY_PATH"] = ":".join(libraries)
    options = {
        "model-repository": repository,
        "backend-directory": backends.parent,
        "http-address": "127.0.0.1",
        "http-port": port,
        "allow-grpc": "false",
        "allow-metrics": "false",
        "log-info": "false",
    }
    server = home / "bin" / "tritonserver"
    os.execv(server, [str(server), *(f"--{name}={value}" for name, value in options.items())])


def _installed() -> Path:
    for folder in site.getsitepackages():
        home = Path(folder) / "pytriton" / "tritonserver"
        if home.is_dir():
            return home
    raise SystemExit("nvidia-pytriton is not installed here")


if __name__ == "__main__":
    main()
