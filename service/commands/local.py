"""Commands that need no server: `convert`, `inspect`, `pack`."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from service.commands import show
from service.errors import ExportError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

_File = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The checkpoint.")]
_Arch = Annotated[str | None, typer.Option("--arch", help="The network's name.")]
_Config = Annotated[
    Path | None, typer.Option("--config", exists=True, help="JSON as an upload's config.")
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def convert(
    source: _File,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Deploy form: .safetensors, .pth or .pt; the program as .bundle, .onnx or "
            ".openvino.zip.",
        ),
    ],
    arch: _Arch = None,
    config: _Config = None,
    report: Annotated[Path | None, typer.Option(help="Write the fusion report here.")] = None,
    as_json: _Json = False,
) -> None:
    """Convert a training checkpoint to its deploy form, with a certificate, without a server."""
    with show.refusals(), tempfile.TemporaryDirectory() as folder:
        result = _convert(source, _config(arch, config), Path(folder), quiet=as_json)
        _write(result["files"], output, Path(folder))
        if report is not None:
            shutil.copyfile(result["files"]["report"], report)
    if as_json:
        show.as_json({**_without_files(result), "output": str(output)})
    else:
        show.certificate(result["architecture"], result["fusion"], str(output))


def inspect(
    source: _File, arch: _Arch = None, config: _Config = None, as_json: _Json = False
) -> None:
    """Tell what a checkpoint is, why that is believed, and what fusing it gives. Writes nothing."""
    from service.pipeline import read_report

    with show.refusals(), tempfile.TemporaryDirectory() as folder:
        result = _convert(source, _config(arch, config), Path(folder), quiet=as_json)
        report, text = read_report(Path(result["files"]["report"]))
    if as_json:
        show.as_json({**_without_files(result), "report": report})
        return
    show.certificate(result["architecture"], result["fusion"], f"{source} ({result['form']} form)")
    for sentence in result["architecture"].get("evidence", ()):
        show.out.print(f"[dim]evidence[/] {escape(sentence)}", highlight=False)
    typer.echo(f"\n{text}")


def pack(
    factory: Annotated[
        str,
        typer.Argument(help="`module:callable` that returns an nn.Module or an exported program."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The bundle to write.")],
    example: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHAPE",
            help="An input's shape with its batch, as 2x3x224x224, and its dtype unless float32, "
            "as 2x16:int64. Once for every input; none for an exported program.",
        ),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Pack any network into a bundle that can be uploaded without its source code.

    Runs your code here, on your machine; the service never runs any.
    """
    from torch import nn

    from service import pack as pack_bundle

    try:
        examples = tuple(_example(text) for text in example or ())
        module, name = factory.split(":")
    except ValueError:
        raise typer.BadParameter(
            "write module:callable, and shapes such as 2x3x224x224 or 2x16:int64"
        ) from None
    sys.path.insert(0, str(Path.cwd()))
    with show.refusals():
        try:
            network = getattr(importlib.import_module(module), name)()
        except (ImportError, AttributeError) as error:
            raise typer.BadParameter(f"{factory}: {error}.", param_hint="factory") from error
        if isinstance(network, nn.Module):
            if not examples:
                raise typer.BadParameter("a module needs an --example for every input")
            pack_bundle(network.eval(), examples, output)
        elif examples:
            raise typer.BadParameter(
                "an exported program has its own examples: leave out --example"
            )
        else:
            pack_bundle(_exported(network, factory), None, output)
    size = output.stat().st_size
    if as_json:
        inputs = [{"shape": list(e.shape), "dtype": _dtype_name(e)} for e in examples]
        show.as_json({"output": str(output), "bytes": size, "examples": inputs})
    else:
        show.out.print(f"{output}: {size:,} bytes")


def _exported(network: Any, factory: str) -> ExportedProgram:
    from torch.export import ExportedProgram

    if isinstance(network, ExportedProgram):
        return network
    raise typer.BadParameter(
        f"{factory} returns a {type(network).__name__}, neither an nn.Module nor what "
        "torch.export.export gives.",
        param_hint="factory",
    )


def _example(text: str) -> Tensor:
    """Zeros of the shape and dtype that `2x16:int64` names."""
    import torch

    shape, _, dtype = text.partition(":")
    kind = getattr(torch, dtype or "float32", None)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"{dtype} is no dtype")
    return torch.zeros(tuple(int(extent) for extent in shape.split("x")), dtype=kind)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _config(arch: str | None, file: Path | None) -> dict[str, Any]:
    from service.hosting import check_config

    with show.refusals():
        config = check_config(b"" if file is None else file.read_bytes())
    return config | ({"architecture": arch} if arch is not None else {})


def _convert(source: Path, config: dict[str, Any], scratch: Path, *, quiet: bool) -> dict[str, Any]:
    from service.hosting import worker_limits
    from service.settings import Settings
    from service.worker import convert_in_child

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=show.err, transient=True, disable=quiet) as bars:
        task = bars.add_task("read", total=1)

        def tell(progress: Any) -> None:
            bars.update(
                task,
                description=progress["stage"],
                completed=progress["done"],
                total=progress["total"],
            )

        limits = worker_limits(Settings()).read
        return convert_in_child(str(source), config, str(scratch), limits, tell)


def _write(files: dict[str, str], output: Path, scratch: Path) -> None:
    from service.exports import FORMATS, export_own_file
    from service.pipeline import save_as_torch

    other = next((f for f in FORMATS.values() if output.name.endswith(f".{f.ending}")), None)
    if "deploy_program" not in files and (other or ".bundle" in output.suffixes):
        raise ExportError(
            "The file holds known blocks of an unknown network, so there is no program to write.",
            remedy="Write .safetensors or .pth, or pack the network: `foldserve pack --help`.",
        )
    if other is not None:
        shutil.copyfile(export_own_file(Path(files["deploy_program"]), other, scratch), output)
    elif output.suffix in (".pth", ".pt"):
        save_as_torch(Path(files["deploy_checkpoint"]), output)
    elif ".bundle" in output.suffixes:
        shutil.copyfile(files["deploy_program"], output)
    else:
        shutil.copyfile(files["deploy_checkpoint"], output)


def _without_files(result: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(result))
    del plain["files"]
    return plain
