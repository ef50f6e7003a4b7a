"""What fusing itself takes: seconds and memory, beside export and the projects' own converters.

    python -m benchmarks fusing                                   this engine alone
    python -m benchmarks fusing --repvgg PATH --dbb PATH ...      beside official converters

Every measurement runs in a fresh process with seeded weights. Memory is what the process held at
most while fusing, above what it held before (the network in memory), relative to the bytes of the
network's state dict. Official converters are imported from a checkout of the project that you name;
nothing of theirs comes with this program, and a converter whose checkout is not given is not run.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.engine import with_seen_data
from service.fusion import fuse
from service.graph import trace
from service.networks import make_network
from service.serving import available_cpus
from service.serving.backends.torch_cpu import cpu_name

SECONDS = 3.0
"""What fusing one ImageNet-size network may take on 2 cores."""
MEMORY = 2.5
"""What it may hold beyond the network, in times the checkpoint's bytes."""
MEASURED = ("seconds", "cpu", "memory")
"""Elapsed seconds, CPU seconds of all threads (which other programs disturb less), peak memory."""


@dataclass(frozen=True)
class Converter:
    """A project's own conversion: the option that names its checkout, and how it is called.

    `setup` lists calls before the model is made, `model` makes it and `convert` converts it, each
    as (module, function, arguments); without `convert` every `switch_to_deploy` is called, which is
    what those projects' conversion scripts do.
    """

    project: str
    model: tuple[str, str, tuple[Any, ...]]
    setup: tuple[tuple[str, str, tuple[Any, ...]], ...] = ()
    convert: tuple[str, str] | None = None


PROJECTS = {
    "repvgg": "DingXiaoH/RepVGG",
    "dbb": "DingXiaoH/DiverseBranchBlock",
    "orepa": "JUGGHM/OREPA_CVPR2022",
    "mobileone": "apple/ml-mobileone",
}
"""Option -> project on GitHub."""


def _repvgg(name: str) -> Converter:
    return Converter(
        "repvgg",
        ("repvgg", "get_RepVGG_func_by_name", (name,)),
        convert=("repvgg", "repvgg_model_convert"),
    )


def _units(project: str, kind: str, arch: str) -> Converter:
    return Converter(
        project,
        ("convnet_utils", "build_model", (arch,)),
        setup=(("convnet_utils", "switch_conv_bn_impl", (kind,)),),
    )


CASES: Mapping[str, Converter | None] = {
    "RepVGG-A0": _repvgg("RepVGG-A0"),
    "RepVGG-B1": _repvgg("RepVGG-B1"),
    "RepVGG-B3g4": _repvgg("RepVGG-B3g4"),
    "RepVGG-D2se": _repvgg("RepVGG-D2se"),
    "DBB-ResNet-18": _units("dbb", "DBB", "ResNet-18"),
    "DBB-ResNet-50": _units("dbb", "DBB", "ResNet-50"),
    "DBB-MobileNet": _units("dbb", "DBB", "MobileNet"),
    "ACB-ResNet-18": _units("dbb", "ACB", "ResNet-18"),
    "OREPA-ResNet-18": _units("orepa", "OREPA", "ResNet-18"),
    "OREPA-ResNet-50": _units("orepa", "OREPA", "ResNet-50"),
    "OREPA-ResNeXt-50": _units("orepa", "OREPA", "ResNeXt-50"),
    "MobileOne-s0": Converter(
        "mobileone",
        ("mobileone", "mobileone", (1000, False, "s0")),
        convert=("mobileone", "reparameterize_model"),
    ),
    "MobileOne-s4": Converter(
        "mobileone",
        ("mobileone", "mobileone", (1000, False, "s4")),
        convert=("mobileone", "reparameterize_model"),
    ),
    "QARepVGG-A0": None,
    "FastViT-SA12": None,
    "RepViT-M0.9": None,
    "RepLKNet-31B": None,
    "UniRepLKNet-A": None,
    "LeViT-128S": None,
    "GoogLeNet": None,
}
"""Networks of ImageNet's size (224x224, 1000 classes) and who else converts them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; answers 1 where this engine passes a limit."""
    options = _parser().parse_args(arguments)
    if options.one:
        print(json.dumps(_one(options.one, options.checkout, options.threads)))
        return 0
    for name, project in PROJECTS.items():
        if getattr(options, name) is None:
            print(f"{project}: no checkout given (--{name} PATH), so its converter is not run")
    print(f"{cpu_name()}, {options.threads} threads, torch {torch.__version__}; 224x224\n")
    print(
        "| network | checkpoint, MB | export, s | fusing, s | of CPU, s | memory, x checkpoint | "
        "official, s | of CPU, s | memory |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    beyond = []
    for case in options.cases or CASES:
        ours = _measured(case, options, None)
        converter = CASES[case]
        checkout = getattr(options, converter.project) if converter else None
        theirs = _measured(case, options, checkout) if checkout else {}
        other = " | ".join(f"{theirs[k]:.2f}" if theirs else "-" for k in MEASURED)
        print(
            f"| {case} | {ours['bytes'] / 1e6:.1f} | {ours['export']:.2f} | "
            f"{' | '.join(f'{ours[k]:.2f}' for k in MEASURED)} | {other} |",
            flush=True,
        )
        if ours["seconds"] >= SECONDS or ours["memory"] >= MEMORY:
            beyond.append(case)
    limits = f"limits: {SECONDS:.0f} s and {MEMORY} times the checkpoint"
    print(f"\n{limits}; {'beyond them: ' + ', '.join(beyond) if beyond else 'all within'}")
    return 1 if beyond else 0


def _measured(case: str, options: argparse.Namespace, checkout: Path | None) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.fusing", "--one", case]
    command += ["--threads", str(options.threads)]
    command += ["--checkout", str(checkout.resolve())] if checkout else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1]
        if checkout is None:
            raise SystemExit(f"{case}: {reason}")
        print(f"{case}: the official conversion fails: {reason}", file=sys.stderr)
        return {}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _one(case: str, checkout: Path | None, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    module = with_seen_data(make_network(case)).eval()
    size = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    if checkout is not None:
        converter = CASES[case]
        assert converter is not None
        return {"bytes": size, **_watched(_official(converter, checkout, module), size)}
    started = time.perf_counter()
    program = trace(module, (torch.zeros(2, 3, 224, 224),))
    export = time.perf_counter() - started
    return {"bytes": size, "export": export, **_watched(lambda: fuse(program), size)}


def _official(converter: Converter, checkout: Path, module: nn.Module) -> Callable[[], object]:
    """The official conversion of the official network with the weights of `module`."""
    sys.path.insert(0, str(checkout))
    for name, function, values in converter.setup:
        _quietly(getattr(importlib.import_module(name), function), *values)
    name, function, values = converter.model
    network = _quietly(getattr(importlib.import_module(name), function), *values)
    if not isinstance(network, nn.Module):
        network = _quietly(network)  # a factory by name
    own = module.state_dict()
    network.load_state_dict({key: own.get(key, t) for key, t in network.state_dict().items()})
    network.eval()
    if converter.convert is not None:
        convert = getattr(importlib.import_module(converter.convert[0]), converter.convert[1])
        return lambda: convert(network)

    def switch() -> nn.Module:
        # Not a list made before: what a block drops as it converts is not converted by itself.
        for part in network.modules():
            if hasattr(part, "switch_to_deploy"):
                part.switch_to_deploy()
        return network

    return switch


def _quietly(function: Callable[..., Any], *values: Any) -> Any:
    """Call `function` with what it prints sent to stderr: stdout is for the result."""
    from contextlib import redirect_stdout

    with redirect_stdout(sys.stderr):
        return function(*values)


def _watched(function: Callable[[], object], size: int) -> dict[str, float]:
    """What `function` took: MEASURED, with memory above what was held before in times `size`."""
    if platform.system() != "Linux":
        raise SystemExit("memory is read from /proc, which this system lacks")
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    before = _status("VmRSS")
    started, worked = time.perf_counter(), time.process_time()
    result = _quietly(function)
    seconds, cpu = time.perf_counter() - started, time.process_time() - worked
    highest = _status("VmHWM")
    del result
    return {"seconds": seconds, "cpu": cpu, "memory": max(0, highest - before) / size}


def _status(key: str) -> int:
    """A memory figure of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, project in PROJECTS.items():
        parser.add_argument(f"--{name}", type=Path, help=f"your checkout of {project}")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), help="only these networks")
    parser.add_argument("--threads", type=int, default=available_cpus(), help="CPU threads")
    parser.add_argument("--one", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--checkout", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
