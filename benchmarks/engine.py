"""Every engine and precision, training form against deploy form, on this machine's CPU.

    python -m benchmarks engine                      RepVGG-A0 at 224x224, batch 1, 8, 32 and 128
    python -m benchmarks engine --help               other networks, batches, precisions

Builds a training-form network with seeded weights and varied batch-norm statistics and fuses it.
Every way runs in turns with the plain training module in eager PyTorch, which is what people serve
by mistake, and that one runs twice, as a control. Speed only: how well lower precisions agree
depends on trained weights, and the service certifies it for each upload.

ONNX Runtime is measured too, on the deploy form that can be downloaded. It is no engine of this
service: it would become one if it were the fastest somewhere.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.arms import RESULTS, Arm, Batch, heading, measure, save, table
from service.exports.convert import to_onnx
from service.fusion import certify, fuse
from service.graph import Program, trace
from service.networks import known_names, make_network
from service.serving import Backend, Precision, available_cpus, backend_names
from service.serving.backends.choices import Choices
from service.serving.backends.openvino_backend import OpenVinoBackend
from service.serving.backends.quantise import is_installed as can_quantise
from service.serving.backends.torch_backend import TorchBackend

PRECISIONS: dict[str, tuple[Precision, ...]] = {
    "torch": ("float32", "bfloat16"),
    "openvino": ("float32", "bfloat16", "int8"),
}
OTHER = "onnxruntime"
CALIBRATION_ROWS = 32


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; answers the exit status."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    module = network(options.network, options.seed).eval()
    train = trace(module, (torch.zeros(1, 3, options.size, options.size),))
    fusion = fuse(train)
    certificate = certify(fusion)
    totals = fusion.report.to_dict()["totals"]
    print(f"certificate {'passed' if certificate.passed else 'FAILED'}", flush=True)
    arms = list(_arms(module, train, fusion.program, options))
    rows = []
    for group in measure(arms, images(options.size), options.batches, options.seconds):
        rows += group
        print("\n".join(table(group)), flush=True)
    data: dict[str, Any] = {
        "network": options.network,
        "input": [3, options.size, options.size],
        "totals": totals,
        "certificate": certificate.to_dict(),
        "environment": heading(options.threads),
        "ways": {arm.name: dict(arm.about) for arm in arms},
        "measured": [row.to_dict() for row in rows],
    }
    title = f"Engines: {options.network}, {options.size}x{options.size}, {options.threads} threads"
    save("engine", title, data, list(table(rows)), options.out)
    return 0


def network(name: str, seed: int) -> nn.Module:
    """A published network with seeded weights and batch norms that have seen different data."""
    torch.manual_seed(seed)
    return with_seen_data(make_network(name))


def with_seen_data(module: nn.Module) -> nn.Module:
    """`module` with random affine parameters and statistics in its batch norms."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
            norm.running_mean = torch.randn(norm.num_features) * 0.2
            norm.running_var = torch.rand(norm.num_features) + 0.5
    return module


def eager(module: nn.Module) -> Callable[[Batch], object]:
    """What runs a batch through a module without gradients."""

    def run(batch: Batch) -> object:
        with torch.inference_mode():
            return module(*batch)

    return run


def images(size: int) -> Callable[[int], Batch]:
    """What makes a batch of normally distributed images."""
    random = torch.Generator().manual_seed(0)
    return lambda batch: (torch.randn(batch, 3, size, size, generator=random),)


def prepared(
    name: str,
    backend: Backend,
    program: Program,
    precision: Precision,
    batches: Sequence[int],
) -> Arm:
    """An arm that is warm; int8 takes its ranges from random images."""
    shape = program.inputs[0].sized(CALIBRATION_ROWS)
    own = (torch.randn(shape),) if precision == "int8" else None
    made = backend.prepare(program, "cpu", precision, batches, own)
    for _ in made.warm():
        pass
    return Arm(name, made.run, made.describe().to_dict())


def _arms(
    module: nn.Module, train: Program, deploy: Program, options: argparse.Namespace
) -> Iterator[Arm]:
    yield Arm("training form, eager module", eager(module))
    sizes, choices = sorted({1, *options.batches}), Choices()
    backends: dict[str, Backend] = {
        "torch": TorchBackend(choices),
        "openvino": OpenVinoBackend(choices),
    }
    for name in options.backends:
        if name == OTHER:
            if find_spec(OTHER) is None:
                print(f"{OTHER} is not measured: it is not installed", flush=True)
            else:
                yield onnx_runtime(deploy, options.threads)
            continue
        for precision in PRECISIONS[name]:
            if precision not in options.precisions or (precision == "int8" and not can_quantise()):
                continue
            for form, program in (("training", train), ("deploy", deploy)):
                if form == "training" and precision != "float32":
                    continue  # what fusing is worth is told in float32
                print(f"preparing {form} form, {name} {precision}", flush=True)
                title = f"{form} form, {name} {precision}"
                yield prepared(title, backends[name], program, precision, sizes)


def onnx_runtime(program: Program, threads: int) -> Arm:
    """An arm that runs what the service gives out as ONNX: float32, `threads` threads."""
    runtime = import_module(OTHER)
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deploy.onnx"
        to_onnx(program, path)
        session = runtime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    names = [spec.name for spec in program.inputs]

    def run(batch: Batch) -> object:
        rows = [column.numpy() for column in batch]
        return session.run(None, dict(zip(names, rows, strict=True)))

    about = {"backend": OTHER, "backend_version": runtime.__version__, "threads": threads}
    return Arm(f"deploy form, {OTHER} float32", run, about)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="RepVGG-A0", choices=known_names(), metavar="NAME")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--batches", type=numbers, default=[1, 8, 32, 128], help="such as 1,8,32")
    parser.add_argument("--seconds", type=float, default=150.0, help="budget of all batch sizes")
    parser.add_argument("--precisions", type=words, default=["float32", "bfloat16", "int8"])
    parser.add_argument("--backends", type=words, default=[*backend_names(), OTHER])
    parser.add_argument("--threads", type=int, default=available_cpus(), help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser


def numbers(text: str) -> list[int]:
    """Whole numbers separated by commas."""
    return [int(part) for part in text.split(",")]


def words(text: str) -> list[str]:
    """Words separated by commas."""
    return text.split(",")


if __name__ == "__main__":
    sys.exit(main())
