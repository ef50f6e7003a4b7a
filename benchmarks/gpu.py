"""The deploy form against the training form, and against torch.compile, on a CUDA device.

    python -m benchmarks gpu           RepVGG-A0 at 224x224, batch 1, 8, 32, 128; some four minutes

Nothing comes from the network. Every precision is measured by itself: the training form in eager
PyTorch first (what is served by mistake), then the deploy form in eager PyTorch, which shows what
fusing alone is worth, in both memory formats, compiled, and as it is served. The inputs of all of
these lie on the device, and every call is waited for. The last two are what a batch costs from the
host's memory and back: rows in float32, and images as grey levels that the device normalises.

`torch.compile` runs with `mode="max-autotune"`. For convolutions in float32 it would also try
Triton's, which took minutes for each batch size and lost to cuDNN for all of the eight shapes that
it came to on an H100; so it is told to leave them out, unless `--every-convolution` is given.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.arms import RESULTS, Arm, Batch, Measured, heading, measure, save, table
from benchmarks.engine import images, network, numbers, words
from service.fusion import fuse
from service.graph import Program, ProgramModule, trace
from service.networks import known_names
from service.serving import BatchPart, Levels
from service.serving.backends.rows import dtype_name
from service.serving.backends.torch_cuda import TorchCuda

COMPILED = ("float32", "bfloat16")
FORMATS = {"channels_last": torch.channels_last, "contiguous_format": torch.contiguous_format}
LEVELS = Levels((1 / 58.4, 1 / 57.1, 1 / 57.4), (2.1, 2.0, 1.8))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; answers the exit status, 2 without a CUDA device."""
    options = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print("There is no CUDA device here.", file=sys.stderr)
        return 2
    module = network(options.network, options.seed).eval()
    deploy = fuse(trace(module, (torch.zeros(1, 3, options.size, options.size),))).program
    rows: list[Measured] = []
    lines: list[str] = []
    ways: dict[str, Any] = {}
    for precision in options.precisions:
        tf32 = precision == "tf32"
        arms = list(_arms(module, deploy, precision, options))
        seconds = options.seconds / len(options.precisions)
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32):
            torch.backends.cuda.matmul.allow_tf32 = tf32
            found = [
                row
                for group in measure(arms, images(options.size), options.batches, seconds)
                for row in group
            ]
        lines += ["", f"## {precision}", "", *table(found)]
        print("\n".join(table(found)), flush=True)
        rows += found
        ways |= {arm.name: dict(arm.about) for arm in arms}
        del arms
        torch.cuda.empty_cache()
    data = {
        "network": options.network,
        "input": [3, options.size, options.size],
        "environment": heading(torch.get_num_threads()),
        "ways": ways,
        "measured": [row.to_dict() for row in rows],
    }
    title = f"GPU: {options.network}, {options.size}x{options.size}"
    save(f"gpu-{options.network.lower()}", title, data, lines, options.out)
    return 0


def _arms(
    module: nn.Module, deploy: Program, precision: Any, options: argparse.Namespace
) -> Iterator[Arm]:
    dtype: torch.dtype = getattr(torch, dtype_name(precision))

    def training() -> nn.Module:
        return copy.deepcopy(module)

    def fused() -> nn.Module:
        return ProgramModule(deploy.to(dtype_name(precision)))

    for name, layout in FORMATS.items():
        yield Arm(
            f"training form, eager, {name}", _with(_moved(training(), dtype, layout), dtype, layout)
        )
    for name, layout in FORMATS.items():
        yield Arm(
            f"deploy form, eager, {name}", _with(_moved(fused(), dtype, layout), dtype, layout)
        )
    if options.compile and precision in COMPILED:
        inductor = import_module("torch._inductor.config")
        inductor.max_autotune_conv_backends = "ATEN,TRITON" if options.every_convolution else "ATEN"
        for name, layout in FORMATS.items():
            compiled: Callable[..., object] = torch.compile(mode="max-autotune", dynamic=False)(
                _moved(fused(), dtype, layout)
            )
            yield Arm(f"deploy form, torch.compile, {name}", _with(compiled, dtype, layout))
    served = TorchCuda(deploy, "cuda:0", precision, sorted({1, *options.batches}))
    for _ in served.warm():
        pass
    about = served.describe().to_dict()
    streams = served.streams
    assert streams is not None
    parts = streams.parts
    assert parts is not None
    grey: dict[int, BatchPart] = {}

    def from_levels(batch: Batch) -> object:
        rows = len(batch[0])
        if rows not in grey:
            shape = (rows, options.size, options.size, 3)
            grey[rows] = BatchPart((torch.randint(0, 256, shape, dtype=torch.uint8),), LEVELS)
        return parts([grey[rows]])

    yield Arm("deploy form, served", lambda batch: served.repeat(len(batch[0])), about)
    yield Arm("served, from the host in float32", served.run, about)
    yield Arm("served, from the host as grey levels", from_levels, about)


def _moved(module: nn.Module, dtype: torch.dtype, layout: torch.memory_format) -> nn.Module:
    module.to(device="cuda", dtype=dtype)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=layout)
    return module


def _with(
    run: Callable[..., object], dtype: torch.dtype, layout: torch.memory_format
) -> Callable[[Batch], object]:
    """Run on a copy of each batch size that lies on the device, and wait for the end."""
    copies: dict[int, list[torch.Tensor]] = {}

    def whole(batch: Batch) -> object:
        size = len(batch[0])
        if size not in copies:
            copies[size] = [x.to("cuda", dtype).contiguous(memory_format=layout) for x in batch]
        with torch.inference_mode():
            result = run(*copies[size])
        torch.cuda.synchronize()
        return result

    return whole


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="RepVGG-A0", choices=known_names(), metavar="NAME")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--batches", type=numbers, default=[1, 8, 32, 128], help="such as 1,128")
    parser.add_argument(
        "--precisions", type=words, default=["float32", "tf32", "bfloat16", "float16"]
    )
    parser.add_argument("--seconds", type=float, default=80.0, help="budget of all measurements")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--every-convolution", action="store_true", help="see above")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
