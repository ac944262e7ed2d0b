"""What `make` installs: which torch, from which index, on which machine."""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
(TORCH,) = re.findall("^torch==.*$", (ROOT / "requirements.txt").read_text("utf-8"), re.MULTILINE)
FROM_CPU_BUILDS = f"--index-url={CPU_BUILDS} --no-deps --timeout=10 --retries=0 {TORCH}"
ALL = "-r requirements.txt"
TOOLS = ("make", "sh", "grep", "touch")

Make = Callable[..., subprocess.CompletedProcess[str]]


def write_command(path: Path, script: str) -> None:
    """Write a command that a shell runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Make, on a Linux without a driver, with a pip that writes down what it is asked for."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    write_command(tmp_path / "bin/uname", "echo Linux")
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool) or tool)
    write_command(tmp_path / "venv/bin/python", f'echo "$@" >> {tmp_path}/asked')

    def run(target: str = "installed", **variables: object) -> subprocess.CompletedProcess[str]:
        settings = {"VENV": "venv", "NVIDIA_FILES": tmp_path / "dev/nvidia*"} | variables
        return subprocess.run(
            ["make", f"--file={ROOT}/Makefile", f"venv/{target}"]
            + [f"{name}={value}" for name, value in settings.items()],
            cwd=tmp_path, capture_output=True, text=True,
            env={"PATH": str(tmp_path / "bin"), "PIP_CONFIG_FILE": os.devnull},
        )  # fmt: skip

    for name in ("requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return run


def asked(folder: Path) -> list[str]:
    """What pip was asked to install, and how."""
    before = "-m pip install --quiet --disable-pip-version-check "
    lines = (folder / "asked").read_text().splitlines()
    assert all(line.startswith(before) for line in lines)
    return [line.removeprefix(before) for line in lines]


def test_without_an_nvidia_driver_torch_comes_from_the_index_of_cpu_builds(
    make: Make, tmp_path: Path
):
    done = make()
    assert (done.returncode, done.stderr) == (0, "")
    assert asked(tmp_path) == [FROM_CPU_BUILDS, ALL]
    assert CPU_BUILDS in done.stdout


def test_a_driver_that_does_not_answer_is_none(make: Make, tmp_path: Path):
    write_command(tmp_path / "bin/nvidia-smi", "echo NVIDIA-SMI has failed; exit 9")
    assert "has failed" not in make().stdout
    assert asked(tmp_path) == [FROM_CPU_BUILDS, ALL]


def test_with_a_driver_that_answers_torch_comes_as_it_always_did(make: Make, tmp_path: Path):
    write_command(tmp_path / "bin/nvidia-smi", "echo NVIDIA-SMI 580")
    assert "no NVIDIA driver" not in make().stdout
    assert asked(tmp_path) == [ALL]


@pytest.mark.parametrize("name", ["nvidia0", "nvidiactl"])
def test_a_file_of_the_driver_is_enough(make: Make, tmp_path: Path, name: str):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / name).touch()
    make()
    assert asked(tmp_path) == [ALL]


@pytest.mark.parametrize("system", ["Darwin", "MINGW64_NT-10.0-26100"])
def test_other_systems_have_no_other_torch_than_that_of_the_package_index(
    make: Make, tmp_path: Path, system: str
):
    write_command(tmp_path / "bin/uname", f"echo {system}")
    make()
    assert asked(tmp_path) == [ALL]


def test_if_the_index_of_cpu_builds_fails_one_line_says_what_follows_and_it_goes_on(
    make: Make, tmp_path: Path
):
    fail_there = 'case "$*" in *--index-url*) echo ERROR >&2; exit 1; esac'
    write_command(tmp_path / "venv/bin/python", f'echo "$@" >> {tmp_path}/asked\n{fail_there}')
    done = make()
    assert (done.returncode, done.stderr) == (0, "")
    assert asked(tmp_path) == [FROM_CPU_BUILDS, ALL]
    (line,) = (line for line in done.stdout.splitlines() if "that failed" in line)
    assert "https://pytorch.org/get-started/locally/" in line
    assert (tmp_path / "venv/installed").exists()


def test_the_tests_take_the_same_torch(make: Make, tmp_path: Path):
    make("installed-dev")
    assert asked(tmp_path) == [FROM_CPU_BUILDS, "-r requirements-dev.txt"]


def test_what_is_installed_is_not_asked_for_again(make: Make, tmp_path: Path):
    make()
    make()
    assert asked(tmp_path) == [FROM_CPU_BUILDS, ALL]


def test_an_installation_that_was_cut_off_begins_again_with_the_cpu_builds(
    make: Make, tmp_path: Path
):
    write_command(tmp_path / "venv/bin/python", f'echo "$@" >> {tmp_path}/asked; exit 1')
    assert make().returncode != 0
    assert make().returncode != 0
    assert asked(tmp_path) == [FROM_CPU_BUILDS, ALL] * 2


METADATA = "Metadata-Version: 2.1\nName: torch\nVersion: {}\n"
UNREACHABLE = "http://127.0.0.1:9"


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """The packages of an environment whose pip is a true one, as far as CPU builds go."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("needs pip")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "real"], check=True)
    pip = f'"{sys.executable}" -m pip --python "{tmp_path}/real/bin/python"'
    write_command(
        tmp_path / "venv/bin/python", f'case "$*" in *--index-url*) shift 2; exec {pip} "$@"; esac'
    )
    return next((tmp_path / "real").rglob("site-packages"))


def test_a_true_pip_finds_the_torch_of_the_index(make: Make, packages: Path, tmp_path: Path):
    version = f"{TORCH.removeprefix('torch==')}+cpu"
    about = f"torch-{version}.dist-info"
    (tmp_path / "index/torch").mkdir(parents=True)
    wheel = f"torch-{version}-py3-none-any.whl"
    (tmp_path / "index/torch/index.html").write_text(f'<a href="{wheel}">{wheel}</a>')
    with zipfile.ZipFile(tmp_path / "index/torch" / wheel, "w") as archive:
        archive.writestr(f"{about}/METADATA", METADATA.format(version))
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    done = make(CPU_BUILDS=(tmp_path / "index").as_uri())
    assert (done.returncode, done.stderr) == (0, "")
    assert "that failed" not in done.stdout
    assert (packages / about).exists()


@pytest.mark.parametrize(
    "build", ["+cpu", *(pytest.param(b, marks=pytest.mark.slow) for b in ("", "+cu130"))]
)
def test_a_true_pip_keeps_a_torch_of_the_right_version_whatever_its_build(
    make: Make, packages: Path, build: str
):
    version = TORCH.removeprefix("torch==") + build
    about = packages / f"torch-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(METADATA.format(version))
    done = make(CPU_BUILDS=UNREACHABLE)
    assert (done.returncode, done.stderr) == (0, "")
    assert "that failed" not in done.stdout
    assert list(packages.glob("torch-*")) == [about]


@pytest.mark.slow
def test_a_true_pip_does_not_wait_long_for_an_index_that_does_not_answer(
    make: Make, packages: Path
):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started_at = time.perf_counter()
        done = make(CPU_BUILDS=f"http://127.0.0.1:{silent.getsockname()[1]}")
        seconds = time.perf_counter() - started_at
    assert "that failed" in done.stdout
    assert 10 < seconds < 30


def test_the_readme_tells_the_same_without_make():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert f".venv/bin/pip install {TORCH} --index-url={CPU_BUILDS}\n" in readme
