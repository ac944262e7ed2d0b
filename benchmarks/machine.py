"""What was measured on: hardware, versions, commit."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.runs import ROOT, python, run

CPU_INFO = Path("/proc/cpuinfo")  # Linux only


def describe() -> dict[str, Any]:
    """Everything about this machine that a number depends on."""
    found = probe()
    return {
        "CPU": cpu_model(),
        "cores": os.cpu_count(),
        "threads": found["threads"],
        "GPU": found["gpu"],
        "torch": version("torch"),
        "Python": platform.python_version(),
        "commit": commit(),
    }


def probe(*arguments: object) -> dict[str, Any]:
    """Ask a child process what only torch knows; see benchmarks/probe.py."""
    return json.loads(run(python("-m", "benchmarks.probe", *arguments)).lines[-1].text)


def today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def cpu_model() -> str:
    """`AMD EPYC`, or where Linux does not say, the kind of processor."""
    text = CPU_INFO.read_text(encoding="utf-8") if CPU_INFO.exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit of this code, with a + if files were changed since; `unknown` without git."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # a copy without git, or no git at all
        return "unknown"
    return found.stdout.strip()
