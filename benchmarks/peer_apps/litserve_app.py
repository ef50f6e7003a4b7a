"""LitServe with its batching and its fast queue; the body reaches the worker as bytes.

It reads annotations as they are, so they are not postponed here.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import litserve
import numpy as np
from fastapi import Body, Response

from benchmarks.workload import Deployed


class Api(litserve.LitAPI):
    folder: Path

    def setup(self, device: str) -> None:
        self.model = Deployed(self.folder)

    def decode_request(
        self, request: Annotated[bytes, Body(media_type="application/octet-stream")]
    ) -> Any:
        return self.model.row(request)

    def batch(self, inputs: list[Any]) -> Any:
        return np.stack(inputs)

    def predict(self, x: Any) -> Any:
        return self.model(x)

    def unbatch(self, output: Any) -> list[Any]:
        return list(output)

    def encode_response(self, output: Any) -> Response:
        return Response(output.tobytes(), media_type="application/octet-stream")


def main() -> None:
    api = Api(max_batch_size=32, batch_timeout=0.001)
    api.folder = Path(sys.argv[1])
    server = litserve.LitServer(api, accelerator="cpu", fast_queue=True, track_requests=False)
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[2]),
        generate_client_file=False,
        log_level="warning",
        access_log=False,
    )


if __name__ == "__main__":
    main()
