"""The event loop gives the interpreter back soon when the device thread asks for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_RUN = """
import sys
from service.api import server
from service.settings import Settings

before = sys.getswitchinterval()
server._Server.run = lambda self, sockets: print(before, sys.getswitchinterval())
server.run(Settings(data_dir=sys.argv[1], port=0))
"""


def test_serving_shortens_how_long_a_thread_keeps_the_interpreter(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _RUN, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    before, while_serving = map(float, ran.stdout.split())
    assert while_serving == 0.0005 < before
