"""Commands that talk to a running service: `push`, `models`, `predict`, `benchmark`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from service.client import API_KEY_VARIABLE, DEFAULT_URL, Client, Version, model_name
from service.commands import chart, show
from service.errors import FoldserveError, InvalidConfig

_Url = Annotated[str, typer.Option("--url", envvar="FOLDSERVE_URL", help="The service.")]
_Model = Annotated[str, typer.Argument(help="The model's name, as `foldserve models` lists it.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def push(
    checkpoint: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="The checkpoint.")
    ],
    model: Annotated[
        str | None, typer.Option(help="The model's name; otherwise it is named after the file.")
    ] = None,
    config: Annotated[Path | None, typer.Option(exists=True, help="Config JSON.")] = None,
    labels: Annotated[
        Path | None, typer.Option(exists=True, help="Class names, one a line, in order.")
    ] = None,
    preprocessing: Annotated[
        str | None, typer.Option(help="A preset, as `imagenet` or `cifar10`.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="What to serve in: float32, bfloat16, int8, auto, ...")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Typical inputs for int8, as .npy."),
    ] = None,
    url: _Url = DEFAULT_URL,
    as_json: _Json = False,
) -> None:
    """Upload a checkpoint, follow its conversion, and show the certificate and a curl line."""
    with show.refusals(), Client(url) as client:
        name = model or model_name(checkpoint)
        given = _upload_config(config, labels, preprocessing=preprocessing, precision=precision)
        version = _upload(client, checkpoint, name, given, calibration, quiet=as_json)
        version = _follow(client, version, quiet=as_json)
    if as_json:
        show.as_json(version.raw)
        return
    assert version.architecture is not None
    assert version.fusion is not None
    show.certificate(version.architecture, version.fusion, f"{name} version {version.version}")
    show.out.print(f"\n{url}/v1/models/{name}", highlight=False)
    show.out.print(_curl(url, version), highlight=False, soft_wrap=True)


def models(url: _Url = DEFAULT_URL, as_json: _Json = False) -> None:
    """List the models and their newest versions."""
    with show.refusals(), Client(url) as client:
        found = [client.model(each["name"]) for each in client.models()]
    if as_json:
        show.as_json(found)
        return
    table = Table("model", "version", "state", "network", "fused", "file")
    for model in found:
        for version in model["versions"]:
            mark = " (default)" if version["default"] else ""
            architecture, fusion = version["architecture"], version["fusion"]
            table.add_row(
                model["name"],
                f"{version['version']}{mark}",
                version["state"],
                architecture["name"] if architecture else "",
                f"{fusion['fused']} of {fusion['blocks']}" if fusion else "",
                version["checkpoint"]["filename"] or "",
            )
    show.out.print(table if found else "No models yet: foldserve push FILE uploads one.")


def predict(
    model: _Model,
    image: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="JPEG, PNG or WebP.")],
    top_k: Annotated[int, typer.Option(min=1, help="Classes to name, best first.")] = 5,
    form: Annotated[
        Literal["deploy", "train"], typer.Option(help="The folded network or the uploaded one.")
    ] = "deploy",
    url: _Url = DEFAULT_URL,
    as_json: _Json = False,
) -> None:
    """Classify an image."""
    with show.refusals(), Client(url) as client:
        (labels,) = client.predict(model, image, top_k=top_k, form=form)
    if as_json:
        show.as_json([vars(label) for label in labels])
        return
    table = Table("label", "index", "score")
    for label in labels:
        table.add_row(label.label, str(label.index), f"{label.score:.4f}")
    show.out.print(table)


def benchmark(
    model: _Model,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            metavar="ROWS",
            help="Batch size; may be repeated. Otherwise those that the service is set to.",
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="Time to spend; otherwise, and at most, what the service is set to."),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the chart into this file.")] = None,
    url: _Url = DEFAULT_URL,
    as_json: _Json = False,
) -> None:
    """Measure the training form against the deploy form on the service's machine."""
    with show.refusals():
        if png is not None:
            chart.require_matplotlib()  # before a measurement that could not be drawn
        with Client(url) as client, show.err.status("measuring"):
            result = client.benchmark(model, batch_sizes=batch, seconds=seconds)
        if png is not None:
            chart.save(result, png)
    if as_json:
        show.as_json(result)
        return
    show.benchmark(result)
    show.out.print()
    show.out.print(chart.bars(result))


def _upload_config(
    config: Path | None, labels: Path | None, **options: str | None
) -> dict[str, Any] | None:
    try:
        given: dict[str, Any] = {} if config is None else json.loads(config.read_bytes())
    except ValueError as error:
        raise InvalidConfig(f"{config} is not JSON: {error}.") from None
    if labels is not None:
        given["labels"] = labels.read_text().splitlines()
    given.update({name: value for name, value in options.items() if value is not None})
    return given or None


def _curl(url: str, version: Version) -> str:
    """A line that asks the new version for a prediction, as it can be pasted into a shell."""
    shape = (version.architecture or {}).get("input_shape")
    if shape is None:
        return "It can be downloaded; to be served it needs its graph: `foldserve pack --help`."
    key = ""
    if API_KEY_VARIABLE in os.environ:
        key = f' -H "Authorization: Bearer ${API_KEY_VARIABLE}"'
    picture = len(shape) == 3 and shape[0] in (1, 3)
    kind, file = ("image/jpeg", "image.jpg") if picture else ("application/x-npy", "rows.npy")
    return (
        f"curl{key} -H 'Content-Type: {kind}' --data-binary @{file} "
        f"{url}/v1/models/{version.model}/predict"
    )


def _upload(
    client: Client,
    file: Path,
    name: str,
    config: dict[str, Any] | None,
    calibration: Path | None,
    *,
    quiet: bool,
) -> Version:
    columns = (TextColumn("upload"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=show.err, transient=True, disable=quiet) as bars:
        task = bars.add_task("upload", total=file.stat().st_size)
        return client.upload(
            file,
            name,
            config=config,
            calibration=calibration,
            progress=lambda sent, total: bars.update(task, completed=sent, total=total),
        )


def _follow(client: Client, version: Version, *, quiet: bool) -> Version:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn())
    with Progress(*columns, console=show.err, transient=True, disable=quiet) as bars:
        task = bars.add_task(version.state, total=1)
        for event in client.events(version):
            data = event["data"]
            if event["event"] == "progress":
                done, total = data["done"], data["total"]
                bars.update(task, description=data["stage"], completed=done, total=total)
    version = client.version(version.model, version.version)
    if version.error is not None:
        raise FoldserveError.from_dict(version.error)
    return version
