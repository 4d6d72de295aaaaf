"""What strangers get: an sdist that is the whole checkout, and a wheel that works where nothing else is.

Skipped without the setuptools that pyproject.toml asks for, and said so.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from conftest import BOUNDS, INTERPRETED

pytest.importorskip("setuptools", "77", reason="packages are made by setuptools 77 or newer (the extra: test)")

ROOT = Path(__file__).parents[1]
as_users_have_it = pytest.mark.skipif(INTERPRETED or BOUNDS, reason="once is enough, with kernels as users have them")
MADE_HERE = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".hypothesis", ".*_cache", ".benchmarks"
)


def run(*line: str | Path, cwd: Path, **environment: str) -> str:
    """The output of a command that must succeed; it sees neither this checkout nor another one's packages."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "NUMBA", "PYTEST"))}
    done = subprocess.run(
        [str(word) for word in line], cwd=cwd, env=kept | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def made(kind: str, source: Path, target: Path) -> Path:
    """The sdist or the wheel that the build backend makes of a source tree."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    run(sys.executable, "-c", code, target, cwd=source)
    (package,) = target.glob({"sdist": "*.tar.gz", "wheel": "*.whl"}[kind])
    return package


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a copy, because setuptools writes into what it packs."""
    place = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, place / "source", symlinks=True, ignore=MADE_HERE)
    return made("sdist", place / "source", place)


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("un packed")
    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4 has it, 3.12 wants it
    with tarfile.open(sdist) as archive:
        archive.extractall(place, **safely)
    (top,) = place.iterdir()
    return top


def test_the_sdist_is_the_checkout(sdist: Path) -> None:
    """Every file that git keeps, and what is a link here is a file there."""
    try:
        listing = ["git", "-c", "safe.directory=*", "ls-files", "-z"]
        known = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no checkout of git's")
    with tarfile.open(sdist) as archive:
        packed = {member.name.partition("/")[2]: member for member in archive}
    expected = {name for name in known.split("\0") if name and (ROOT / name).exists()}
    assert expected - packed.keys() == set()
    assert all(packed[name].isfile() for name in expected)


@as_users_have_it
def test_the_tests_of_the_sdist_can_be_collected(unpacked: Path) -> None:
    line = "-m", "pytest", "--collect-only", "-q", "--assert=plain"  # nothing to be rewritten
    said = run(sys.executable, *line, cwd=unpacked, PYTHONPATH="src")
    assert "tests/test_package.py::test_the_sdist_is_the_checkout" in said


@as_users_have_it
def test_the_wheel_works_alone(unpacked: Path, tmp_path: Path) -> None:
    """Installed into an environment of its own and used in an empty folder: info, walk, and the whole demo."""
    pytest.importorskip("pip")
    wheel = made("wheel", unpacked, tmp_path)
    names = set(zipfile.ZipFile(wheel).namelist())
    package = unpacked / "src" / "fastexit"
    here = {path.relative_to(package.parent).as_posix() for path in package.rglob("*") if path.is_file()}
    assert {name for name in here if "__pycache__" not in name} - names == set()
    home = tmp_path / "an environment"
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=tmp_path)
    python = home / "bin" / "python"
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=tmp_path
    )
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=tmp_path).strip())
    # What fastexit needs comes from here: a path in a .pth file is behind the environment's own packages, and .pth
    # files of that path, such as the one of an editable fastexit, do not count.
    places = {sysconfig.get_paths()[name] for name in ("purelib", "platlib")}
    (site / "needs.pth").write_text("".join(f"{place}\n" for place in places))
    empty = tmp_path / "empty"
    empty.mkdir()
    where = run(python, "-c", "import fastexit; print(fastexit.__file__)", cwd=empty)
    assert where.startswith(str(site))
    fastexit = home / "bin" / "fastexit"
    assert json.loads(run(fastexit, "info", "--json", cwd=empty))["fastexit"] == version("fastexit")
    assert "IPI left in step" in run(fastexit, "walk", cwd=empty)
    said = run(fastexit, "demo", cwd=empty)
    assert "no mismatch" in said
    assert "5. Who interrupts whom" in said
