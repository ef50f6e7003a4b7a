"""Bare FastAPI under uvicorn (uvloop, httptools, one process), calling the model in the route."""

from __future__ import annotations

import sys
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request, Response

from benchmarks.workload import Deployed


def main() -> None:
    folder, port = Path(sys.argv[1]), int(sys.argv[2])
    model = Deployed(folder)
    app = FastAPI()

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        row = model.row(await request.body())
        logits = model(row[None])
        return Response(logits.tobytes(), media_type="application/octet-stream")

    uvicorn.run(app, host="127.0.0.1", port=port, loop="uvloop", http="httptools", access_log=False)


if __name__ == "__main__":
    main()
