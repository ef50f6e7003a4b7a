"""MLServer with adaptive batching. Its REST protocol is JSON, so a row travels in base64."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
from mlserver import MLModel
from mlserver.codecs import Base64Codec, NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

from benchmarks.workload import Deployed


class Runtime(MLModel):
    async def load(self) -> bool:
        assert self.settings.parameters is not None
        self._deployed = Deployed(Path(str(self.settings.parameters.uri)))
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        given = payload.inputs[0]
        if given.datatype == "BYTES":
            rows = np.stack([self._deployed.row(row) for row in Base64Codec.decode_input(given)])
        else:
            rows = NumpyCodec.decode_input(given).astype(np.float32)
        logits = NumpyCodec.encode_output("logits", self._deployed(rows))
        return InferenceResponse(model_name=self.name, outputs=[logits])


def main() -> None:
    folder, port = Path(sys.argv[1]), int(sys.argv[2])
    model = Path(mkdtemp(dir=folder))
    (model / "settings.json").write_text(
        json.dumps(
            {
                "host": "127.0.0.1",
                "http_port": port,
                "grpc_port": port + 1,
                "metrics_port": port + 2,
                "parallel_workers": 0,
                "debug": False,
            }
        )
    )
    (model / "model-settings.json").write_text(
        json.dumps(
            {
                "name": "model",
                "implementation": "benchmarks.peer_apps.mlserver_app.Runtime",
                "max_batch_size": 32,
                "max_batch_time": 0.001,
                "parameters": {"uri": str(folder)},
            }
        )
    )
    from mlserver.cli.main import main as command

    sys.argv = ["mlserver", "start", str(model)]
    command()


if __name__ == "__main__":
    main()
