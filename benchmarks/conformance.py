"""Every conformance case through the engine, as a table beside the official code's figures.

    python -m benchmarks conformance [CASE ...]

The cases were made with the projects' official implementations; their folder is named by
FOLDSERVE_CONFORMANCE, or is `shared/conformance` beside the checkout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import torch

from service.serving.backends.torch_cpu import cpu_name
from tests.conformance.measure import Row, measure, summary, table
from tests.networks import cases

HEADING = """# Conformance

Written by `python -m benchmarks conformance`. Convolutions and multiply-accumulates (of a sample)
are those of the training form, of the official deploy form and of ours. Errors are relative to the
official training form's float64 output; `noise` is its own float32 error, of which ten times are
allowed. `tensors` is the worst checksum of our deploy tensors against the official ones. Seconds
are those of fusing.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; answers 1 where a case fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="only these cases")
    wanted = parser.parse_args(arguments).cases or cases.names("")
    if not wanted:
        print(f"no conformance cases in {cases.FOLDER}; set FOLDSERVE_CONFORMANCE", file=sys.stderr)
        return 2
    rows: list[Row] = []
    print(HEADING)
    for line in table(_measured(wanted, rows)):
        print(line, flush=True)
    print("\n" + "\n".join(summary(rows)))
    print(f"\n{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    return 1 if any(list(row.failures()) for row in rows) else 0


def _measured(names: Sequence[str], rows: list[Row]) -> Iterator[Row]:
    """Measure one case after the other; what is measured is also added to `rows`."""
    for name in names:
        rows.append(measure(name))
        yield rows[-1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
