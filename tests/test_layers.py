"""Who may import whom inside `service`, and that the engine stays free of the web stack."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "service"

# Layers that each layer may import, besides itself. `errors` is plain Python without dependencies,
# so the whole house may raise from it; `settings` stays away from the engine and its programs.
_LEAVES = frozenset({"errors", "settings"})
ALLOWED: dict[str, frozenset[str]] = {
    "__init__": frozenset({"graph"}),  # `service.pack`, imported when it is called
    "errors": frozenset(),
    "settings": frozenset(),
    "graph": frozenset({"errors"}),
    "relay": frozenset(),
    "fusion": frozenset({"errors", "graph"}),
    "networks": _LEAVES | {"graph"},
    "checkpoint": _LEAVES,
    "store": _LEAVES,
    "serving": _LEAVES | {"graph"},
    "bench": _LEAVES | {"graph"},
    "pipeline": _LEAVES
    | {"checkpoint", "networks", "graph", "fusion", "store", "serving"}
    | {"partial"},
    "partial": _LEAVES | {"networks", "graph", "fusion"},
    "worker": _LEAVES
    | {"pipeline", "checkpoint", "networks", "graph", "fusion", "store"}
    | {"serving", "bench"},
    "recovery": frozenset({"errors"}),
    "hosting": _LEAVES
    | {"worker", "checkpoint", "networks", "graph", "store"}
    | {"serving", "bench", "recovery"},
    "provision": _LEAVES | {"hosting", "store"},
    "exports": _LEAVES | {"checkpoint", "graph", "fusion", "store"},
    "web": _LEAVES,
    "client": _LEAVES,
    "api": _LEAVES
    | {"pipeline", "worker", "hosting", "serving", "bench", "store"}
    | {"web", "exports", "provision", "recovery", "relay"},
    "demo": _LEAVES | {"client", "networks"},
    "commands": _LEAVES
    | {"__init__", "client", "pipeline", "worker", "hosting", "store", "exports"},
    "cli": _LEAVES | {"api", "commands", "demo"},
}


def layer_of(path: Path, package: Path) -> str:
    return path.relative_to(package).parts[0].removesuffix(".py")


def imported_layers(source: str, path: Path, package: Path) -> set[str]:
    """Layers of `service` that one module imports, at any depth, relative imports included."""
    module = ("service", *path.relative_to(package).with_suffix("").parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module[: -node.level]) if node.level else ""
            stem = ".".join(part for part in (base, node.module) if part)
            names = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "service" and len(parts) > 1 and parts[1] != "__version__":
                found.add("__init__" if parts[1] == "pack" else parts[1])
    return found


def violations(package: Path) -> list[str]:
    wrong = []
    for path in sorted(package.rglob("*.py")):
        layer = layer_of(path, package)
        if layer not in ALLOWED:
            wrong.append(f"{path.relative_to(package)}: {layer} has no place in the house")
            continue
        for other in sorted(imported_layers(path.read_text(), path, package)):
            if other not in ALLOWED[layer] | {layer}:
                wrong.append(f"{path.relative_to(package)}: {layer} imports {other}")
    return wrong


def test_layers_import_downward_only() -> None:
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("fusion/rules.py", "import service.settings", "fusion imports settings"),
        ("fusion/rules.py", "from service.networks import repvgg", "fusion imports networks"),
        ("graph/trace.py", "from ..store.catalog import Catalog", "graph imports store"),
        ("serving/batcher.py", "from service import api", "serving imports api"),
        ("store/blobs.py", "def f():\n    import service.pipeline", "store imports pipeline"),
        ("helpers/x.py", "", "helpers has no place"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, line: str, complaint: str) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(line + "\n")
    (found,) = violations(tmp_path)
    assert complaint in found


def test_allowed_layers_have_no_cycle() -> None:
    order: list[str] = []

    def visit(layer: str, above: tuple[str, ...]) -> None:
        assert layer not in above, f"cycle: {(*above, layer)}"
        for other in ALLOWED[layer]:
            visit(other, (*above, layer))
        order.append(layer)

    for layer in ALLOWED:
        visit(layer, ())
    assert order.index("errors") < order.index("api")


def loaded_after(module: str) -> set[str]:
    """Top-level modules of a fresh process that has imported `module` and nothing else."""
    code = f"import sys, {module}; print(*{{n.split('.')[0] for n in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.skipif(
    importlib.util.find_spec("service.fusion") is None, reason="service.fusion is not there yet"
)
def test_the_engine_loads_no_web_stack() -> None:
    loaded = loaded_after("service.fusion")
    assert "torch" in loaded
    assert loaded.isdisjoint({"fastapi", "starlette", "pydantic", "sqlalchemy", "uvicorn"})


def test_the_probe_sees_the_web_stack_where_it_is() -> None:
    assert "pydantic" in loaded_after("service.settings")


def test_an_http_process_loads_neither_torch_nor_the_application() -> None:
    loaded = loaded_after("service.api.front_process")
    assert "uvicorn" in loaded
    assert loaded.isdisjoint({"torch", "service.api.app", "service.serving"})
