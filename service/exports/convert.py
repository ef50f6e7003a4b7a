"""Inside the child: a program in another engine's format, run there and compared.

The inputs are the certificate's probes and the limit is its end-to-end limit: the other engine has
to agree with the program in float64 as closely as the served precision must.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.errors import ExportFailed
from service.fusion.certificate import CertificateLimits, end_to_end_error, make_probes
from service.graph import Program, load_program
from service.graph.exported import to_exported
from service.graph.module import run

Run = Callable[[Sequence[NDArray[Any]]], Sequence[NDArray[Any]]]

PROBES = 4
SEED = 2021
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


def onnx_in_child(bundle: str, scratch: str, progress: Any) -> dict[str, Any]:
    """Write `deploy.onnx` into `scratch`."""
    to_onnx(load_program(Path(bundle)), Path(scratch) / "deploy.onnx")
    return {"made": True}


def openvino_in_child(bundle: str, scratch: str, progress: Any) -> dict[str, Any]:
    """Write `deploy.openvino.zip` into `scratch`: `deploy.xml` and `deploy.bin`."""
    folder = Path(scratch)
    to_openvino(load_program(Path(bundle)), folder)
    with zipfile.ZipFile(folder / "deploy.openvino.zip", "w") as archive:
        for name in ("deploy.xml", "deploy.bin"):
            # A fixed date, so that the same program gives the same bytes.
            entry = zipfile.ZipInfo(name, _ZIP_DATE)
            with (folder / name).open("rb") as source, archive.open(entry, "w") as target:
                while piece := source.read(1 << 20):
                    target.write(piece)
    return {"made": True}


def to_onnx(program: Program, path: Path) -> None:
    """Write `program` in float32 as ONNX with a batch axis called `batch`, and check it.

    Inputs are called as in the program, outputs `output_0`, `output_1`, …. Raises ExportFailed.
    """
    names = _output_names(program)
    float32 = program.to("float32")
    try:
        made: Any = torch.onnx.export(
            to_exported(float32),
            input_names=[spec.name for spec in program.inputs],
            output_names=names,
            dynamo=True,
            verbose=False,
        )
        proto = made.model_proto
    except Exception as error:
        raise _failed("ONNX", error) from error
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del proto.graph.value_info[:]  # shapes in between have the exporter's own symbols
    import_module("onnx").save_model(proto, str(path))
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        inputs = [spec.name for spec in program.inputs]
        check(program, lambda rows: session.run(names, dict(zip(inputs, rows, strict=True))))
    except ExportFailed:
        raise
    except Exception as error:
        raise _failed("ONNX", error) from error


def to_openvino(program: Program, folder: Path) -> None:
    """Write `program` in float32 as `deploy.xml` and `deploy.bin`, and check them.

    Inputs and outputs are called as in `to_onnx`. Raises ExportFailed.
    """
    # It reports its use to its makers unless the package that does so cannot be imported.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    openvino = import_module("openvino")
    names = [spec.name for spec in program.inputs]
    path = folder / "deploy.xml"
    try:
        model = openvino.convert_model(to_exported(program.to("float32")))
        for port, name in zip(model.inputs, names, strict=True):
            port.tensor.set_names({name})
        for port, name in zip(model.outputs, _output_names(program), strict=True):
            port.tensor.set_names({name})
        openvino.save_model(model, str(path), compress_to_fp16=False)
        core = openvino.Core()
        # Said outright, because on some processors its own choice is bfloat16.
        exact = {
            "INFERENCE_PRECISION_HINT": openvino.Type.f32,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        compiled = core.compile_model(core.read_model(str(path)), "CPU", exact)
        check(program, lambda rows: list(compiled(list(rows)).values()))
    except ExportFailed:
        raise
    except Exception as error:
        raise _failed("OpenVINO", error) from error


def check(program: Program, engine: Run) -> None:
    """Compare `engine` with the program in float64 on the probes, together and one by one.

    Raises ExportFailed where it differs by more than the certificate allows end to end.
    """
    probes = make_probes(program, PROBES, SEED)
    truth = run(program.to("float64"), *probes)
    rows = [_as_sent(probe) for probe in probes]
    whole = engine(rows)
    apart = [engine([column[index : index + 1] for column in rows]) for index in range(PROBES)]
    for name, outputs in (
        ("a batch", whole),
        ("single rows", [np.concatenate(column) for column in zip(*apart, strict=True)]),
    ):
        found = [torch.from_numpy(np.array(output)) for output in outputs]
        error = end_to_end_error(truth, found)
        limit = CertificateLimits().end_to_end
        if not error <= limit:
            raise ExportFailed(
                f"The exported network's outputs differ on {name} by {error:.2e} of their "
                f"variation; at most {limit:.0e} is allowed.",
                error_end_to_end=error,
            )


def _as_sent(probe: Tensor) -> NDArray[Any]:
    return (probe.float() if probe.is_floating_point() else probe).numpy()


def _output_names(program: Program) -> list[str]:
    return [f"output_{index}" for index in range(len(program.outputs))]


def _failed(kind: str, error: Exception) -> ExportFailed:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ExportFailed(f"The network could not be exported to {kind}: {first[:400]}")
