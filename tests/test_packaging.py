"""What an installation promises: the lock is complete, the metadata honest, the wheel whole."""

from __future__ import annotations

import ast
import importlib.metadata as metadata
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]

# Declared because something loads them by name: the server its loop and parser, the conversion's
# child its filter, the catalog its driver, OpenVINO a parser of versions.
LOADED_BY_NAME = {"uvloop", "httptools", "pyseccomp", "openvino", "packaging"}
EXTRAS = ("demo", "test", "int8", "postgres", "grpc", "onnx")
MODULES = {
    "pillow": "PIL",
    "scikit-learn": "sklearn",
    "python-multipart": "python_multipart",
    "grpcio": "grpc",
    "protobuf": "google",
    "opentelemetry-sdk": "opentelemetry",
}


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def lock() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def requirements(*extras: str) -> list[Requirement]:
    table = project()
    lines = [*table["dependencies"]]
    for extra in extras:
        lines += table["optional-dependencies"][extra]
    return [Requirement(line) for line in lines if not line.startswith("foldserve[")]


def closure(roots: Iterable[Requirement]) -> set[str]:
    """Names of everything that the installed packages among `roots` need on this machine."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(canonicalize_name(r.name), frozenset(r.extras)) for r in roots if applies(r, "")]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for line in needs(name):
            inner = Requirement(line)
            if any(applies(inner, extra) for extra in extras or {""}):
                waiting.append((canonicalize_name(inner.name), frozenset(inner.extras)))
    return {name for name, _ in seen}


def needs(name: str) -> list[str]:
    """What an installed distribution requires; nothing where an extra is not installed here."""
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []


def applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def unpinned(pins: dict[str, str], roots: Iterable[Requirement]) -> set[str]:
    # A CUDA build of torch brings its own exactly pinned companions.
    return {n for n in closure(roots) - pins.keys() if not n.startswith(("nvidia-", "cuda-"))} - {
        "triton"
    }


def test_every_installed_dependency_is_pinned() -> None:
    assert unpinned(lock(), requirements(*EXTRAS)) == set()


def test_a_pin_that_is_gone_is_noticed() -> None:
    pins = lock()
    del pins["starlette"], pins["anyio"]
    assert unpinned(pins, requirements(*EXTRAS)) == {"starlette", "anyio"}


def test_pins_satisfy_what_the_project_declares() -> None:
    for requirement in requirements(*EXTRAS):
        version = lock()[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} but the lock has {version}"


def test_the_lock_holds_plain_releases_and_no_address() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert lock()["torch"] == "2.13.0"
    for line in text.splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line), line


ALONE = """
import json, sys
from importlib.machinery import PathFinder

class Brought:
    absent = set(json.loads(sys.argv[1]))

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in self.absent:
            return PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Brought()

import torch
from torch import nn
from service.fusion import fuse
from service.graph import trace
from service.serving import backend_named, backend_names

network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()).eval()
program = fuse(trace(network, (torch.zeros(2, 3, 8, 8),))).program
for name in backend_names():
    prepared = backend_named(name, threads=1).prepare(program, "cpu", "float32", (1, 2))
    list(prepared.warm())
    print(name, tuple(prepared.run((torch.ones(2, 3, 8, 8),))[0].shape))
"""


def run_alone(*also_absent: str) -> subprocess.CompletedProcess[str]:
    """Every engine, in a process that sees only what a plain installation brings."""
    brought = closure(requirements())
    absent = {
        module
        for module, names in metadata.packages_distributions().items()
        if not any(canonicalize_name(name) in {*brought, "foldserve"} for name in names)
    }
    modules = json.dumps(sorted({*absent, *also_absent}))
    command = [sys.executable, "-c", ALONE, modules]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_engine_runs_on_a_plain_installation() -> None:
    done = run_alone()
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == ["torch (2, 4, 8, 8)", "openvino (2, 4, 8, 8)"]


def test_an_engine_that_lacks_a_package_is_noticed() -> None:
    done = run_alone("packaging")
    assert done.returncode != 0
    assert "openvino (2, 4, 8, 8)" not in done.stdout


def imported_modules(folder: Path) -> set[str]:
    """Top-level names of everything that the modules below `folder` import."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"service", "_typeshed"}


def module_of(distribution: str) -> str:
    return MODULES.get(distribution, distribution.replace("-", "_"))


def test_what_the_code_imports_is_declared() -> None:
    declared = {
        module_of(canonicalize_name(r.name))
        for r in requirements("demo", "grpc", "onnx", "plot", "otel")
    }
    assert imported_modules(ROOT / "service") - declared == set()


def test_what_is_declared_is_imported() -> None:
    declared = {canonicalize_name(r.name) for r in requirements()} - LOADED_BY_NAME
    imported = imported_modules(ROOT / "service")
    assert {name for name in declared if module_of(name) not in imported} == set()


def test_an_undeclared_import_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import os\ndef f():\n    from yaml.nodes import Node\n")
    assert imported_modules(tmp_path) == {"yaml"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel built from a copy of what git tracks, in a fresh folder."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in tracked():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(out), str(source)], check=True, capture_output=True)
    (path,) = out.iterdir()
    assert path.name.startswith("foldserve-")
    return set(zipfile.ZipFile(path).namelist())


def tracked() -> list[str]:
    """Files of the project that git knows, or would know after `git add`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]
    top = ("pyproject.toml", "README.md", "LICENSE")
    return [name for name in names if name.startswith("service/") or name in top]


def test_the_wheel_carries_every_file_of_the_package(wheel: set[str]) -> None:
    assert {name for name in tracked() if name.startswith("service/")} - wheel == set()


def test_the_wheel_carries_nothing_else(wheel: set[str]) -> None:
    assert {name for name in wheel if not name.startswith(("service/", "foldserve-"))} == set()


def test_the_licence_is_apache_2_in_full() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert text.count("\n   ") > 150
    for section in range(1, 10):
        assert re.search(rf"^   {section}\. [A-Z]", text, re.MULTILINE), section


def test_ci_calls_the_make_targets_and_nothing_hidden() -> None:
    script = (ROOT / ".ci/run").read_text()
    commands = [line.strip() for line in script.splitlines() if line and not line.startswith("#")]
    assert commands[-2:] == ["make lint", "make test"]
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


@pytest.mark.parametrize(
    "target",
    ["install", "install-test", "test", "lint", "serve", "demo", "bench", "soak", "clean"],
)
def test_make_knows_the_target(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
