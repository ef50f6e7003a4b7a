"""`python -m benchmarks [NAME] [options]`: run one benchmark, or `engine` if none is named.

Names: conformance, decoding, engine, fronts, fusing, gpu, gpu_server, orepa, server, shares,
siblings (see `--help`).
"""

from __future__ import annotations

import sys
from importlib import import_module

BENCHMARKS = (
    "conformance",
    "decoding",
    "engine",
    "fronts",
    "fusing",
    "gpu",
    "gpu_server",
    "orepa",
    "server",
    "shares",
    "siblings",
)


def main(arguments: list[str]) -> int:
    """Run the benchmark that the first argument names; answers the exit status."""
    name, rest = "engine", arguments
    if arguments and not arguments[0].startswith("-"):
        name, rest = arguments[0], arguments[1:]
    if name not in BENCHMARKS:
        print(f"no benchmark {name!r}; known: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    status: int = import_module(f"benchmarks.{name}").main(rest)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
