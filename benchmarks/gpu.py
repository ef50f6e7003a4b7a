"""The deploy form against the training form, and against torch.compile, on a CUDA device.

    python -m benchmarks gpu           RepVGG-A0 at 224x224, batch 1, 32 and 128; under ten minutes

Nothing comes from the network. The inputs of the first three ways lie on the device and every call
is waited for, so that they show the arithmetic; the others are what the service runs, with rows
from the host's memory and answers back in it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from benchmarks.arms import RESULTS, Arm, Batch, Measured, heading, measure, save, table
from benchmarks.engine import images, network, numbers, prepared
from service.fusion import fuse
from service.graph import Program, ProgramModule, trace
from service.networks import known_names
from service.serving import Precision
from service.serving.backends.torch_backend import TorchBackend

SERVED: tuple[Precision, ...] = ("float32", "tf32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; answers the exit status, 2 without a CUDA device."""
    options = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print("There is no CUDA device here.", file=sys.stderr)
        return 2
    module = network(options.network, options.seed).eval()
    train = trace(module, (torch.zeros(1, 3, options.size, options.size),))
    deploy = fuse(train).program
    arms = list(_arms(module, deploy, options))
    rows: list[Measured] = []
    for group in measure(arms, images(options.size), options.batches, options.seconds):
        rows += group
        print("\n".join(table(group)), flush=True)
    data = {
        "network": options.network,
        "input": [3, options.size, options.size],
        "environment": heading(torch.get_num_threads()),
        "ways": {arm.name: dict(arm.about) for arm in arms},
        "measured": [row.to_dict() for row in rows],
    }
    title = f"GPU: {options.network}, {options.size}x{options.size}"
    save("gpu", title, data, list(table(rows)), options.out)
    return 0


def _arms(module: nn.Module, deploy: Program, options: argparse.Namespace) -> Iterator[Arm]:
    # In float32 throughout: PyTorch would otherwise use TF32 inside convolutions.
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.benchmark = True
    fused = ProgramModule(deploy)
    for each in (module, fused):
        each.to(device="cuda", memory_format=torch.channels_last)
    yield Arm("training form, eager float32", _on_device(module))
    yield Arm("deploy form, eager float32", _on_device(fused))
    if options.compile:
        compiled = torch.compile(fused, mode="max-autotune", dynamic=False)
        yield Arm("deploy form, torch.compile max-autotune float32", _on_device(compiled))
    sizes = sorted({1, *options.batches})
    for precision in SERVED:
        title = f"deploy form as served, {precision}"
        yield prepared(title, TorchBackend(), deploy, precision, sizes, "cuda:0")


def _on_device(run: Callable[..., object]) -> Callable[[Batch], object]:
    """Run on a copy of each batch size that lies on the device, and wait for the end."""
    copies: dict[int, list[torch.Tensor]] = {}

    def whole(batch: Batch) -> object:
        size = len(batch[0])
        if size not in copies:
            copies[size] = [x.cuda().contiguous(memory_format=torch.channels_last) for x in batch]
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
    parser.add_argument("--batches", type=numbers, default=[1, 32, 128], help="such as 1,128")
    parser.add_argument("--seconds", type=float, default=60.0, help="budget of all batch sizes")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
