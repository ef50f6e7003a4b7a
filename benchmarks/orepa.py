"""What squeezing online saves while training: OREPA against the same network of DBB blocks.

    python -m benchmarks orepa                        ResNet-18 at 64x64, batch 16
    python -m benchmarks orepa --help                 other networks, sizes, batches, devices

The claim of the paper (Hu et al. 2022, table 1) is that one convolution on features a block costs
less time and memory than every branch's own. Three networks of one shape (plain, DBB, OREPA) take
training steps in turn: forward, backward, SGD. Time is the median of a step with its quartiles;
`saved` is what autograd keeps between forward and backward, parameters left out, counted storage by
storage; `peak` is what the process holds at most above what it held before the first step (on a
GPU, what its allocator reports).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.networks import make_network
from service.serving import available_cpus
from service.serving.backends.torch_cpu import cpu_name

KINDS = ("Plain", "DBB", "OREPA")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; answers the exit status."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    print(
        f"{options.network}, batch {options.batch} of {options.size}x{options.size}, "
        f"{options.rounds} steps; {place}, {options.threads} threads, torch {torch.__version__}\n"
    )
    steps, saved, peaks = {}, {}, {}
    for kind in KINDS:
        step, network, batch = training_step(f"{kind}-{options.network}", options, device)
        saved[kind] = saved_bytes(network, batch)
        peaks[kind] = _peak(step, device)
        steps[kind] = step
    times = _interleaved(steps, options.rounds, device)
    print("| network | step, ms (quartiles) | saved, MB | peak, MB | parameters, M |")
    print("|---|--:|--:|--:|--:|")
    for kind in KINDS:
        low, middle, high = statistics.quantiles(times[kind], n=4)
        count = sum(p.numel() for p in make_network(f"{kind}-{options.network}").parameters())
        print(
            f"| {kind}-{options.network} | {middle * 1e3:.0f} ({low * 1e3:.0f}-{high * 1e3:.0f}) | "
            f"{saved[kind] / 1e6:.0f} | {peaks[kind] / 1e6:.0f} | {count / 1e6:.1f} |"
        )
    faster = statistics.median(times["DBB"]) / statistics.median(times["OREPA"])
    print(
        f"\nOREPA against DBB: {faster:.2f} times as fast, "
        f"{1 - saved['OREPA'] / saved['DBB']:.0%} less saved, "
        f"{1 - peaks['OREPA'] / peaks['DBB']:.0%} less at the peak"
    )
    return 0


def training_step(
    name: str, options: argparse.Namespace, device: torch.device
) -> tuple[Callable[[], None], nn.Module, Tensor]:
    """A function that takes one training step of the network `name`; the network; its batch."""
    torch.manual_seed(options.seed)
    network = make_network(name, num_classes=100).to(device).train()
    batch = torch.randn(options.batch, 3, options.size, options.size, device=device)
    target = torch.randint(100, (options.batch,), device=device)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        F.cross_entropy(network(batch), target).backward()
        optimiser.step()

    return step, network, batch


def saved_bytes(network: nn.Module, batch: Tensor) -> int:
    """Bytes that autograd keeps after a forward pass, each storage once, parameters left out."""
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = network(batch)
    total = sum(found.values())
    del output
    return total


def _peak(step: Callable[[], None], device: torch.device) -> int:
    """Bytes held at most during two steps above those held before."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        step()
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    before = _status("VmRSS")
    step()
    step()
    return max(0, _status("VmHWM") - before)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def _interleaved(
    steps: dict[str, Callable[[], None]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every step, the networks in turn, after one step each to warm up."""
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for kind, step in steps.items():
            started = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[kind].append(time.perf_counter() - started)
    return times


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="ResNet-18", help="ResNet-18, -34, -50, MobileNet")
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10, help="measured steps of each network")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=available_cpus(), help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
