"""Build and run every host there is: ``make embed-test``. C with all its checks, CMake, pkg-config, a wheel, C++, Rust,
an event loop, SimPy, Unicorn, APICs of one's own.

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
TESTS = ROOT / "tests"
SCRATCH = ROOT / "build" / "embed-test"
KERNELS = "FASTEXIT_KVM_UNIT_TESTS"
"""Names the folder x86/ of a built tree of kvm-unit-tests."""


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


def make(*targets: str, folder: Path = TESTS / "embed_c", place: str = "", **variables: str) -> None:
    """Targets of a host's Makefile, built in a folder of their own."""
    build = os.path.relpath(SCRATCH / (place or folder.name), folder)  # a target of make's has no space in its name
    given = {"PYTHON": sys.executable, "BUILD": build, **variables}
    run("make", "-s", *(f"{name}={value}" for name, value in given.items()), *targets, cwd=folder)


def need(program: str) -> None:
    """That a program is in PATH."""
    if shutil.which(program) is None:
        raise Missing(f"no {program}")


def need_c() -> None:
    """That a C program can be built with Python inside."""
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


def c_example() -> None:
    """Two threads, a clock and timers."""
    need_c()
    make("check", folder=EXAMPLES / "embed_c", place="c")


def c_host() -> None:
    """The C door against the Python door, timed, stormed, fuzzed."""
    need_c()
    make("check", "time", "storm", "fuzz")


def full_storm() -> None:
    """Nothing lost of 10^8."""
    need_c()
    make("storm-full")


def address_sanitizer() -> None:
    """With UndefinedBehaviorSanitizer."""
    need_sanitizer("address")
    need_sanitizer("undefined")
    make("asan")


def thread_sanitizer() -> None:
    """No race in the library's C."""
    need_sanitizer("thread")
    make("tsan")


def cmake() -> None:
    """The example by find_package."""
    need_c()
    need("cmake")
    make("cmake", folder=EXAMPLES / "embed_c", place="c-cmake")


def cpp_host(compiler: str) -> None:
    """Eight threads, a level interrupt and a copy, without exceptions and without a warning."""
    need_c()
    need(compiler)
    make("check", folder=EXAMPLES / "embed_cpp", place=compiler, CXX=compiler)


def cpp_cmake() -> None:
    """The same by find_package."""
    need_c()
    need("cmake")
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise Missing("no C++ compiler")
    make("cmake", folder=EXAMPLES / "embed_cpp", place="cpp-cmake")


def rust_host() -> None:
    """The same operations by two doors, from Rust; no crate is fetched."""
    need_c()
    cargo = shutil.which("cargo") or shutil.which("cargo", path=str(Path.home() / ".cargo" / "bin"))
    if cargo is None:
        raise Missing("no cargo")
    make("check", folder=EXAMPLES / "embed_rust", place="rust", CARGO=cargo)


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
    """The program of docs/embedding.md."""
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
    tests = sorted(TESTS.glob(f"test_{module}*.py"))
    run(sys.executable, "-m", "pytest", "-q", "-m", "not long", *tests)
    for example in examples:
        run(sys.executable, *example.split())


def event_loop() -> None:
    """A heap of events; nothing else is needed."""
    run(sys.executable, EXAMPLES / "event_loop.py")


def kernels() -> None:
    """kvm-unit-tests on Unicorn's CPUs."""
    if importlib.util.find_spec("unicorn") is None:
        raise Missing("no unicorn: pip install unicorn")
    if not os.environ.get(KERNELS):
        raise Missing(f"no kvm-unit-tests: {KERNELS}=TREE/x86 says where they are")
    run(sys.executable, "-m", "pytest", "-q", TESTS / "test_unicorn_kernels.py")


def own_apic(program: str | Path) -> None:
    """An APIC of one's own agrees with the model where KVM and the SDM do."""
    run(sys.executable, "-m", "fastexit", "verify", "--against", program, "--well-formed", "--ops", "5000")


def own_apic_in_c() -> None:
    """The same in C."""
    try:
        compiler = build.compiler()
    except ValueError as missing:
        raise Missing(str(missing)) from None
    program = SCRATCH / "my_apic"
    run(*compiler, "-O1", "-Wall", "-Wextra", EXAMPLES / "my_apic.c", "-o", program)
    own_apic(program)


def c_abi() -> None:
    """Each call of the C door against the Python door's."""
    need_c()
    files = [*sorted(TESTS.glob("test_cabi*.py")), TESTS / "test_embed.py"]
    run(sys.executable, "-m", "pytest", "-q", "-m", "not long", *files)  # the long ones are the steps below


STEPS: dict[str, Callable[[], None]] = {
    "C ABI against Python": c_abi,
    "C example": c_example,
    "C example: CMake": cmake,
    "C: two threads, fuzzer": c_host,
    "C: 10^8 IPIs": full_storm,
    "C: AddressSanitizer": address_sanitizer,
    "C: ThreadSanitizer": thread_sanitizer,
    "C: pkg-config": pkg_config,
    "C: from a wheel": wheel,
    "C++: g++": lambda: cpp_host("g++"),
    "C++: clang++": lambda: cpp_host("clang++"),
    "C++: CMake": cpp_cmake,
    "Rust": rust_host,
    "event loop": event_loop,
    "SimPy": lambda: adapter(
        "simpy",
        "examples/simpy_timers.py",
        "benchmarks/simpy_ipi.py --quick --output build/embed-test/simpy",
    ),
    "Unicorn": lambda: adapter(
        "unicorn",
        "examples/unicorn_guest.py",
        "benchmarks/unicorn_ipi.py",
        "benchmarks/unicorn_ipi.py --xapic",
    ),
    "Unicorn: kvm-unit-tests": kernels,
    "own APIC: Python": lambda: own_apic(EXAMPLES / "my_apic.py"),
    "own APIC: C": own_apic_in_c,
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
