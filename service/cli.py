"""The command `foldserve`: serve, convert without a server, and talk to a running one.

Exit codes: 0 done, 1 refused (the problem is printed with its remedy), 2 wrong usage.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service import __version__
from service.commands import keys, show
from service.commands.local import convert, inspect, pack
from service.commands.remote import benchmark, models, predict, push
from service.commands.storage import backup, gc, verify

app = typer.Typer(
    name="foldserve",
    help="Upload a training checkpoint; get the fused network, its certificate and an endpoint.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    epilog="Exit status: 0 done, 1 refused (the reason and its remedy are printed) or no service "
    "answers, 2 wrong usage. A service that asks for an API key gets that of `FOLDSERVE_API_KEY`. "
    "`foldserve COMMAND --help` tells more; `--install-completion` completes commands in your "
    "shell.",
)


def main() -> None:
    """Entry point of the installed command."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the embedded store.")] = None,
    http_processes: Annotated[
        int | None, typer.Option(help="Processes that do the HTTP work in front of this one.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH", help="A checkpoint to serve from the start; may be repeated."
        ),
    ] = None,
) -> None:
    """Run the service until SIGTERM or Ctrl-C.

    Every other setting is an environment variable; docs/configuration.md lists them.
    """
    settings = show.settings(
        host=host,
        port=port,
        data_dir=data_dir,
        http_processes=http_processes,
        models=model or None,
    )
    from service.api.server import run  # torch takes seconds to import; --help should not

    raise typer.Exit(run(settings))


@app.command()
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the service running.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was seen as JSON; the rest to stderr.")
    ] = False,
) -> None:
    """Train two small networks, convert, serve and benchmark them, from nothing to a result."""
    from service.demo import run

    raise typer.Exit(run(keep=keep, as_json=as_json))


for command in (convert, inspect, pack, push, models, predict, benchmark, verify, gc, backup):
    app.command()(command)
app.add_typer(keys.app, name="keys")


if __name__ == "__main__":
    main()
