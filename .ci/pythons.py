"""Run a part of the suite on every Python that the project supports and this machine has: ``make test-pythons``.

Interpreters come from PATH, from ~/.pyenv/versions and from $PYTHONS, paths of more with colons between. Each gets an
environment in build/pythons/, which is set up once. What is missing is named. Exit code 1 when the project cannot be
installed or a test fails, or when nothing could be tried.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
MINORS = (11, 12, 13, 14)
ENVIRONMENTS = ROOT / "build" / "pythons"
EXTRAS = "test,plot,sim,unicorn"
NOUNS = """
    apicv bad_input batch cabi cabi_refusals cli cost dispatcher embed entry events fast_generic halt imports inhibits
    jit_cache kvm_host lapic_state native_layout package pi posted simpy snapshot threads timer trace_order trace_reader
    tracefs traps traps_accept traps_fastpath unicast unicorn user_msr
""".split()
"""What leans on the interpreter: the compiler, its cache, warnings, threads, signals, C. And each kind of exit once."""

IDENTITY = "import sys; print(*sys.version_info[:3], sys.implementation.name, sys.base_prefix)"


class Interpreter(NamedTuple):
    """One Python: ``prefix`` tells two builds of a version apart."""

    version: tuple[int, int, int]
    prefix: str

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.version))} of {self.prefix}"


def identity(python: Path) -> Interpreter | None:
    """Which Python that is; None for what cannot be started, or is none that the project supports."""
    try:
        done = subprocess.run([python, "-c", IDENTITY], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    major, minor, micro, kind, prefix = done.stdout.strip().split(" ", 4)
    version = int(major), int(minor), int(micro)
    return Interpreter(version, prefix) if kind == "cpython" and version[0] == 3 and version[1] in MINORS else None


def interpreters() -> dict[Interpreter, Path]:
    """Every Python that is here, and how it is called."""
    places = [Path(place) for place in os.environ.get("PATH", "").split(os.pathsep) if place]
    places += sorted((Path.home() / ".pyenv" / "versions").glob("*/bin"))
    called = [place / f"python3.{minor}" for place in places for minor in MINORS]
    called += [Path(path) for path in os.environ.get("PYTHONS", "").split(os.pathsep) if path]
    found: dict[Interpreter, Path] = {}
    for python in called:
        if (which := identity(python)) is not None:
            found.setdefault(which, python)
    return dict(sorted(found.items()))


def complaint(*line: str | Path) -> str:
    """The first line that a failed command has said; nothing when it went well."""
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    said = [text for text in done.stdout.splitlines() if text.strip()] or [f"exit code {done.returncode}"]
    return said[0] if done.returncode else ""


def tried(which: Interpreter, python: Path) -> str:
    """How the tests ended on one Python."""
    home = ENVIRONMENTS / f"{'.'.join(map(str, which.version))}-{which.prefix.strip('/').replace('/', '-')}"
    inside, stamp = home / "bin" / "python", home / "installed"
    if not stamp.exists() or stamp.stat().st_mtime < (ROOT / "pyproject.toml").stat().st_mtime:
        if why := complaint(python, "-m", "venv", "--clear", home):
            return f"skipped: it makes no environments: {why}"
        install = "-m", "pip", "install", "-qq", "--disable-pip-version-check", "-e", f"{ROOT}[{EXTRAS}]"
        if why := complaint(inside, *install):
            return f"FAILED: the project cannot be installed: {why}"
        stamp.touch()
    line = [inside, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", "-m", "not long"]
    line += [f"tests/test_{noun}.py" for noun in NOUNS]
    began = time.monotonic()
    code = subprocess.run(line, cwd=ROOT, check=False).returncode
    return f"{'FAILED' if code else 'ok'} in {time.monotonic() - began:.0f} s"


def main() -> int:
    """Each Python in turn, and a summary."""
    found = interpreters()
    ended = {}
    for which, python in found.items():
        print(f"== Python {which}", flush=True)
        ended[which] = tried(which, python)
    print("== summary")
    for which, how in ended.items():
        print(f"Python {which}: {how}")
    for minor in MINORS:
        if not any(which.version[1] == minor for which in found):
            print(f"Python 3.{minor}: none here")
    failed = any(how.startswith("FAILED") for how in ended.values())
    return 1 if failed or not any(how.startswith("ok") for how in ended.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
