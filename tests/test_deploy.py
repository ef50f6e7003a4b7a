"""What runs the service elsewhere: the image's recipe, the compose file, the manifests."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service import __version__
from service.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
KUBERNETES = "1.31"


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def hadolint(recipe: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "Dockerfile").write_text(recipe)
    command = Path(sys.executable).with_name("hadolint")
    return subprocess.run([command, folder / "Dockerfile"], capture_output=True, text=True)


def test_hadolint_finds_nothing_in_the_dockerfile(tmp_path: Path) -> None:
    recipe = (ROOT / "Dockerfile").read_text()
    assert hadolint(recipe, tmp_path).stdout == ""
    flawed = hadolint(recipe.replace("WORKDIR /data", "RUN cd /data"), tmp_path)
    assert flawed.returncode != 0
    assert "DL3003" in flawed.stdout


def test_the_image_runs_unprivileged_with_both_targets() -> None:
    recipe = (ROOT / "Dockerfile").read_text()
    stages = [line.split()[-1] for line in recipe.splitlines() if line.startswith("FROM ")]
    assert stages[-2:] == ["cuda", "cpu"]  # the last one is what a build without a target makes
    assert "USER 10001:10001" in recipe
    assert "HEALTHCHECK" in recipe
    assert 'ENTRYPOINT ["foldserve"]' in recipe


def test_what_the_image_copies_is_let_through() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    let_through = [line[1:] for line in ignore if line.startswith("!")]
    recipe = (ROOT / "Dockerfile").read_text().splitlines()
    copies = [line.split()[1:-1] for line in recipe if line.startswith("COPY ")]
    copies = [names for names in copies if not names[0].startswith("--from")]
    for name in {name for names in copies for name in names} - {"wheel[s]"}:
        assert (ROOT / name).exists(), name
        assert any(name == place or name.startswith(f"{place}/") for place in let_through), name


def test_variables_that_are_set_are_settings() -> None:
    known = {row.variable for row in Settings.table()} | {"FOLDSERVE_API_KEY"}
    files = [ROOT / "docker-compose.yml", ROOT / "Dockerfile", *DEPLOY.rglob("*.yaml")]
    text = "\n".join(path.read_text() for path in files)
    named = set(re.findall(r"FOLDSERVE_[A-Z_]+[A-Z]", text))
    assert len(named) >= 6
    assert named - known == set()


def test_the_compose_file_publishes_to_loopback_alone() -> None:
    (compose,) = documents(ROOT / "docker-compose.yml")
    assert set(compose["services"]) == {"foldserve", "foldserve-gpu", "prometheus", "grafana"}
    for name, service in compose["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
    for name in ("foldserve", "foldserve-gpu"):
        service = compose["services"][name]
        assert service["image"].startswith(f"foldserve:{__version__}")
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
    assert compose["services"]["foldserve-gpu"]["profiles"] == ["gpu"]
    assert "profiles" not in compose["services"]["foldserve"]


@pytest.mark.skipif(
    shutil.which("docker-compose") is None, reason="docker-compose is not installed"
)
def test_compose_accepts_the_file() -> None:
    for profiles in ((), ("--profile", "gpu", "--profile", "monitoring")):
        done = subprocess.run(
            ["docker-compose", "-f", ROOT / "docker-compose.yml", *profiles, "config", "-q"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


def test_the_manifest_is_what_kubernetes_accepts() -> None:
    found = documents(DEPLOY / "kubernetes/foldserve.yaml")
    assert [each["kind"] for each in found] == ["PersistentVolumeClaim", "Deployment", "Service"]
    for each in found:
        kubernetes_validate.validate(each, KUBERNETES, strict=True)
    pod = found[1]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {container["image"], pod["initContainers"][0]["image"]} == {f"foldserve:{__version__}"}
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    flawed = copy.deepcopy(found[1])
    flawed["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(flawed, KUBERNETES, strict=True)


def test_the_serving_runtime_holds_containers_that_kubernetes_accepts() -> None:
    """KServe's own schema is not on any package index; the pod that it makes is Kubernetes'."""
    runtime, service = documents(DEPLOY / "kserve/serving-runtime.yaml")
    assert (runtime["kind"], service["kind"]) == ("ServingRuntime", "InferenceService")
    spec = runtime["spec"]
    assert spec["protocolVersions"] == ["v2"]
    (container,) = spec["containers"]
    assert container["name"] == "kserve-container"
    assert container["image"] == f"foldserve:{__version__}"
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "runtime"},
        "spec": {"containers": spec["containers"]},
    }
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    (wanted,) = spec["supportedModelFormats"]
    asked = service["spec"]["predictor"]["model"]
    assert asked["modelFormat"] == {"name": wanted["name"], "version": wanted["version"]}
