"""Build and run every host there is: C with all its checks, CMake, pkg-config, a wheel, C++, Rust, SimPy, Unicorn.

What a machine does not have is skipped and named. Exit code 1 when anything that could run has failed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from fastexit.embed import build

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
SCRATCH = ROOT / "build" / "embed-test"


class Missing(Exception):
    """What this machine does not have."""


def run(*line: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """The output of a command, which is shown; CalledProcessError when it fails."""
    words = [str(word) for word in line]
    print("$", *words, flush=True)
    done = subprocess.run(
        words,
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout, end="", flush=True)
    done.check_returncode()
    return done.stdout


def make(*targets: str, language: str = "c", place: str = "", **variables: str) -> None:
    """Targets of an example's Makefile, in a folder of their own."""
    example = EXAMPLES / f"embed_{language}"
    build = os.path.relpath(SCRATCH / (place or language), example)  # a target of make's has no space in its name
    given = {"PYTHON": sys.executable, "BUILD": build, **variables}
    run("make", "-s", *(f"{name}={value}" for name, value in given.items()), *targets, cwd=example)


def need(program: str) -> None:
    if shutil.which(program) is None:
        raise Missing(f"no {program}")


def need_c() -> None:
    need("make")
    try:
        build.compiler()
        build.interpreter()
    except ValueError as missing:
        raise Missing(str(missing)) from None


def need_sanitizer(name: str) -> None:
    """That a program with it can be built, and runs: ThreadSanitizer cannot live with every kernel's address layout."""
    need_c()
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "a.c", Path(scratch) / "a"
        source.write_text("int main(void) { return 0; }\n")
        line = [*build.compiler(), f"-fsanitize={name}", str(source), "-o", str(target)]
        for step in (line, [str(target)]):
            if subprocess.run(step, capture_output=True, check=False).returncode:
                raise Missing(f"-fsanitize={name} does not work here")


def c_host() -> None:
    need_c()
    make("check", "time", "storm", "fuzz")


def full_storm() -> None:
    need_c()
    make("storm-full")


def address_sanitizer() -> None:
    need_sanitizer("address")
    need_sanitizer("undefined")
    make("asan")


def thread_sanitizer() -> None:
    need_sanitizer("thread")
    make("tsan")


def cmake() -> None:
    need_c()
    need("cmake")
    make("cmake")


def cpp_host(compiler: str) -> None:
    """Eight threads, a level interrupt and a copy, without exceptions and without a warning."""
    need_c()
    need(compiler)
    make("check", language="cpp", place=compiler, CXX=compiler)


def cpp_cmake() -> None:
    need_c()
    need("cmake")
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise Missing("no C++ compiler")
    make("cmake", language="cpp", place="cpp-cmake")


def rust_host() -> None:
    """The same operations by two doors, from Rust; no crate is fetched."""
    need_c()
    cargo = shutil.which("cargo") or shutil.which("cargo", path=str(Path.home() / ".cargo" / "bin"))
    if cargo is None:
        raise Missing("no cargo")
    make("check", language="rust", CARGO=cargo)


def _page() -> tuple[str, str]:
    """The program of docs/embedding.md, and what it prints."""
    text = (ROOT / "docs" / "embedding.md").read_text()
    program, shown, *_ = re.findall(r"```(?:c|text)\n(.*?)```", text, flags=re.DOTALL)
    return program, shown


def _demo(folder: Path, options: list[str]) -> None:
    program, shown = _page()
    (folder / "main.c").write_text(program)
    run(*build.compiler(), "main.c", *options, "-o", "demo", cwd=folder)
    if run(folder / "demo", cwd=folder) != shown:
        raise ValueError("the program of docs/embedding.md prints something else")


def pkg_config() -> None:
    need_c()
    need("pkg-config")
    folder = SCRATCH / "pkg-config"
    run(sys.executable, "-m", "fastexit", "embed", "build", "-o", folder)
    _demo(folder, shlex.split(run("pkg-config", "--cflags", "--libs", "fastexit", PKG_CONFIG_PATH=str(folder))))


def wheel() -> None:
    """An installed wheel has all that it takes, in an empty folder."""
    need_c()
    folder = SCRATCH / "wheel"
    folder.mkdir()
    source = folder / "source"
    shutil.copytree(
        ROOT,
        source,
        symlinks=True,
        ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__"),
    )
    try:
        run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source)
    except subprocess.CalledProcessError:
        raise Missing("pip cannot make a wheel here: it takes setuptools 77 or newer") from None
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as packed:
        packed.extractall(folder / "site")
    place = {"PYTHONPATH": str(folder / "site")}
    where = run(sys.executable, "-P", "-c", "import fastexit; print(fastexit.__file__)", cwd=folder, **place)
    if not where.startswith(str(folder / "site")):
        raise ValueError(f"that is not the wheel: {where}")
    tool = [sys.executable, "-P", "-m", "fastexit", "embed"]
    run(*tool, "build", "-o", "fx", cwd=folder, **place)
    options = run(*tool, "cflags", "-o", "fx", cwd=folder, **place) + run(
        *tool, "libs", "-o", "fx", cwd=folder, **place
    )
    _demo(folder, shlex.split(options))


def adapter(module: str, *examples: str) -> None:
    """The tests of an adapter, and its examples."""
    if importlib.util.find_spec(module) is None:
        raise Missing(f"no {module}: pip install {module}")
    run(sys.executable, "-m", "pytest", "-q", "-m", "", f"tests/test_{module}.py")
    for example in examples:
        run(sys.executable, *example.split())


def c_abi() -> None:
    need_c()
    files = [*sorted((ROOT / "tests").glob("test_cabi*.py")), ROOT / "tests" / "test_embed.py"]
    run(sys.executable, "-m", "pytest", "-q", "-m", "not long", *files)  # the long ones are the steps below


STEPS: dict[str, Callable[[], None]] = {
    "C ABI against Python": c_abi,
    "C host: two threads": c_host,
    "C host: 10^8 IPIs": full_storm,
    "C host: AddressSanitizer": address_sanitizer,
    "C host: ThreadSanitizer": thread_sanitizer,
    "C host: CMake": cmake,
    "C host: pkg-config": pkg_config,
    "C host: from a wheel": wheel,
    "C++ host: g++": lambda: cpp_host("g++"),
    "C++ host: clang++": lambda: cpp_host("clang++"),
    "C++ host: CMake": cpp_cmake,
    "Rust host": rust_host,
    "SimPy": lambda: adapter("simpy", "examples/simpy_ipi.py --quick --output build/embed-test/simpy"),
    "Unicorn": lambda: adapter("unicorn", "examples/unicorn_ipi.py", "examples/unicorn_ipi.py --xapic"),
}


def all_steps() -> Iterator[tuple[str, str]]:
    """Each step and how it ended."""
    for name, step in STEPS.items():
        print(f"== {name}", flush=True)
        began = time.monotonic()
        try:
            step()
        except Missing as missing:
            yield name, f"skipped: {missing}"
        except (subprocess.CalledProcessError, ValueError, OSError) as error:
            yield name, f"FAILED: {error}"
        else:
            yield name, f"ok, {time.monotonic() - began:.0f} s"


def main() -> int:
    """The summary of all steps, and 1 if any has failed."""
    shutil.rmtree(SCRATCH, ignore_errors=True)
    SCRATCH.mkdir(parents=True)
    ended = dict(all_steps())
    print("== summary")
    for name, how in ended.items():
        print(f"{name:26} {how}")
    return any(how.startswith("FAILED") for how in ended.values())


if __name__ == "__main__":
    sys.exit(main())
