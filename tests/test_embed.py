"""libfastexit as a stranger meets it: built by the command line, linked by a program in C, started anywhere.

Skipped without a C compiler or a shared libpython, and said so.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import cffi
import pytest

import fastexit
from conftest import BOUNDS, INTERPRETED
from embedded import built, need_compiler, run_host
from fastexit.cli import main
from fastexit.embed import build, cabi, host
from fastexit.layout import ABI_VERSION

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "tests" / "embed_c"
compiled = pytest.mark.skipif(INTERPRETED or BOUNDS, reason="a host wants kernels as they are meant to run")


def first_blocks(*kinds: str) -> list[str]:
    """The first block of each kind that docs/embedding.md has: its program, what that prints, how it is built."""
    page = (ROOT / "docs" / "embedding.md").read_text()
    return [re.search(rf"```{kind}\n(.*?)```", page, flags=re.DOTALL)[1] for kind in kinds]


def compile_host(target: Path, *sources: Path | str, library: Path) -> Path:
    """A program that links the library by what cflags and libs print."""
    line = [*build.compiler(), "-O1", "-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-pthread"]
    line += [*shlex.split(build.cflags(library)), f"-I{ROOT / 'native'}", *map(str, sources)]
    line += ["-o", str(target), *shlex.split(build.libs(library))]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def library() -> Path:
    need_compiler()
    cabi.addresses()  # into the cache, so that no host has to compile
    return built()


@pytest.fixture(scope="module")
def program(library: Path) -> Path:
    """The example, once for all workers and runs."""
    sources = [EXAMPLE / name for name in ("main.c", "storm.c", "timing.c", "fuzz.c")]
    target = library / "embed_c"
    newest = max(path.stat().st_mtime for path in (*sources, EXAMPLE / "host.h", ROOT / "native" / "lower_bound.c"))
    if not target.exists() or target.stat().st_mtime < newest:
        half = library / f"embed_c.{os.getpid()}"
        compile_host(half, *sources, library=library).replace(target)
    return target


# -------------------------------------------------------------------------------------------------------- the host
@compiled
def test_two_threads_and_the_python_door(program: Path, tmp_path: Path) -> None:
    """Every result of two vCPU threads, the memory and the LAPIC pages are the Python door's."""
    done = run_host(program, "check", str(tmp_path / "check.bin"), "2000")
    assert done.returncode == 0, done.stderr
    scope: dict = {"__name__": "check"}
    exec(compile((EXAMPLE / "judge.py").read_text(), "check.py", "exec"), scope)
    assert scope["main"](str(tmp_path / "check.bin")) == 0
    data = bytearray((tmp_path / "check.bin").read_bytes())
    data[8 + 80 * 17 + 8] ^= 1  # the completion of IPI 17
    (tmp_path / "check.bin").write_bytes(data)
    assert scope["main"](str(tmp_path / "check.bin")) == 1


@compiled
def test_storm(program: Path) -> None:
    """Nothing lost, nothing invented; and a planted fault of each kind is noticed."""
    done = run_host(program, "storm", "100000")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100000 IPIs" in done.stdout
    assert "0 lost, 0 invented" in done.stdout
    done = run_host(program, "storm", "20000", "1")
    told = re.search(r"(\d+) lost, (\d+) invented", done.stdout)  # one that had no processor for long is lost, too
    assert told
    assert (done.returncode, min(map(int, told.groups())) >= 2) == (1, True), done.stdout


@compiled
def test_no_call_wants_the_gil(library: Path) -> None:
    """The storm's threads come to an end while the thread that waits for them keeps the GIL."""
    target = library / "storm.so"
    if not target.exists():
        half = library / f"storm.{os.getpid()}"
        sources = [EXAMPLE / name for name in ("main.c", "storm.c", "timing.c", "fuzz.c")]
        compile_host(half, "-shared", "-fPIC", *sources, library=library).replace(target)
    code = "import ctypes, sys; sys.exit(ctypes.PyDLL(sys.argv[1]).storm(ctypes.c_uint64(20_000), ctypes.c_uint64(0)))"
    done = subprocess.run([sys.executable, "-c", code, str(target)], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@compiled
def test_fuzz(program: Path) -> None:
    done = run_host(program, "fuzz", "5000")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5000 calls, 0 with another answer" in done.stdout


@pytest.mark.long
@compiled
def test_full_storm_and_fuzz(program: Path) -> None:
    for args, says in ((("storm", "100000000"), "0 lost, 0 invented"), (("fuzz", "1000000"), " 0 with another answer")):
        done = run_host(program, *args, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        assert says in done.stdout


# ---------------------------------------------------------------------------------------------- the interpreter inside
def small(library: Path) -> Path:
    """A program that opens and closes a machine: 0 or minus the status as its exit code."""
    target, source = library / "small", library / f"small.{os.getpid()}.c"
    if not target.exists():
        source.write_text(
            """#include <fastexit.h>
            int main(void)
            {
                struct fx_config config = { .size = sizeof config, .abi = FX_ABI_VERSION, .vcpus = 1 };
                fx_machine *machine;
                int status = fx_open(&config, 0, &machine, 0);
                return status ? -status : fx_close(machine);
            }"""
        )
        half = library / f"small.{os.getpid()}"
        compile_host(half, source, library=library).replace(target)
        source.unlink()
    return target


@compiled
@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"FASTEXIT_PYTHON": "/nowhere/python"}, "no Python at /nowhere/python"),
        ({"FASTEXIT_PYTHON": "/bin/false"}, "no Python that runs"),
        ({"FASTEXIT_PYTHON": "{other}"}, "is Python 3.2, this library needs Python"),
        ({"FASTEXIT_PYTHON": "{empty}"}, "fastexit cannot be imported by"),
        ({"NUMBA_DISABLE_JIT": "1"}, "kernels are interpreted"),
    ],
)
def test_a_wrong_environment_is_one_line(library: Path, tmp_path: Path, environment: dict[str, str], says: str) -> None:
    """FX_E_PYTHON and a line that says what to do: no traceback, no abort."""
    other = tmp_path / "python3.2"
    other.write_text("#!/bin/sh\necho 3.2\n")
    other.chmod(0o755)
    empty = tmp_path / "empty" / "bin" / "python3"
    empty.parent.mkdir(parents=True)
    empty.symlink_to(Path(sys.executable).resolve())
    (tmp_path / "empty" / "pyvenv.cfg").write_text(f"home = {Path(sys.executable).resolve().parent}\n")
    given = {name: value.format(other=other, empty=empty) for name, value in environment.items()}
    done = run_host(small(library), **given)
    assert done.returncode == 8, done.stderr
    assert says in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


@compiled
def test_the_hosts_own_python_settings_do_not_count(library: Path) -> None:
    """PYTHONHOME ends an interpreter that believes it; PYTHONPATH could bring other packages."""
    done = run_host(small(library), PYTHONHOME="/nowhere", PYTHONPATH="/nowhere", PYTHONSTARTUP="/nowhere")
    assert (done.returncode, done.stderr) == (0, "")


@compiled
def test_another_abi_is_one_line() -> None:
    """A package that was upgraded behind the library's back."""
    ffi = cffi.FFI()
    ffi.cdef("".join(cabi.declarations(name) for name in (*cabi.HEADERS, cabi.SHIM)))
    table = ffi.new("struct fxp_table *", {"size": ffi.sizeof("struct fxp_table"), "abi": 1})
    with pytest.raises(host._Refused, match=r"libfastexit has ABI version 1, .*: fastexit embed build") as refused:
        host._start(ffi, table)
    assert refused.value.status == cabi.Status.E_ABI
    table.abi = ABI_VERSION
    table.size -= 8
    with pytest.raises(host._Refused, match="build the library again"):
        host._start(ffi, table)


THREADS = r"""
#include <fastexit.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

enum { THREADS = 4, TIMES = 25 };

static struct fx_ops fx = { .size = sizeof fx, .abi = FX_ABI_VERSION };
static pthread_barrier_t gate;
static fx_machine *shared;
static int closed;

static fx_machine *open_one(int32_t expected)
{
    struct fx_config config = { .size = sizeof config, .abi = FX_ABI_VERSION, .vcpus = 2,
                                .flags = FX_BOOT_X2APIC | FX_QUIET };
    fx_machine *m;

    if (fx_open(&config, NULL, &m, NULL) != expected)
        fprintf(stderr, "open: %s\n", fx_last_error()), _exit(1);
    return m;
}

static void *run(void *given)
{
    struct fx_ops calls = { .size = sizeof calls, .abi = FX_ABI_VERSION };
    struct fx_config config = { .size = sizeof config, .abi = FX_ABI_VERSION, .vcpus = 1 };
    struct fx_result result;

    pthread_barrier_wait(&gate);
    if (fx_open(&config, NULL, given, &calls)) /* the first of all, by every thread at once */
        _exit(2);
    for (int i = 0; i < TIMES; i++) {
        fx_machine *m = open_one(FX_OK);

        if (calls.wrmsr(m, 0, 0x830, 1ull << 32 | 0x41, &result) || result.accepted != 1 || fx_close(m))
            _exit(3);
    }
    pthread_barrier_wait(&gate);
    for (int i = 0; i < TIMES; i++) {
        if (given == &shared)
            shared = open_one(FX_OK);
        pthread_barrier_wait(&gate);
        __atomic_fetch_add(&closed, fx_close(shared) == FX_OK, __ATOMIC_RELAXED);
        pthread_barrier_wait(&gate);
    }
    return NULL;
}

int main(void)
{
    fx_machine *first[THREADS] = { 0 }, *m;
    struct fx_result result;
    pthread_t threads[THREADS];
    int state;

    pthread_barrier_init(&gate, NULL, THREADS);
    for (int i = 0; i < THREADS; i++)
        pthread_create(&threads[i], NULL, run, i ? (void *)&first[i] : (void *)&shared);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    if (closed != TIMES)
        return 4;
    for (int i = 1; i < THREADS; i++)
        if (fx_close(first[i]))
            return 5;
    m = open_one(FX_OK);
    if (fx_restore("", 0, NULL, &shared, &fx) != FX_E_SNAPSHOT)
        return 6;
    {
        struct fx_config config = { .size = sizeof config, .abi = FX_ABI_VERSION, .vcpus = 1 };

        if (fx_open(&config, NULL, &shared, &fx))
            return 7;
    }
    if (!fork()) { /* a copy that works, and a Python that does not */
        open_one(FX_E_PYTHON);
        if (fx.wrmsr(m, 0, 0x830, 1ull << 32 | 0x41, &result) || result.accepted != 1 || fx_close(m))
            _exit(8);
        _exit(fx_close(m) == FX_E_MACHINE ? 0 : 9);
    }
    wait(&state);
    if (fx.rdmsr(m, 0, 0x830, &result) || result.value) /* the child's IPI was the child's */
        return 10;
    printf("%d %d\n", WIFEXITED(state) ? WEXITSTATUS(state) : -1, fx_close(m));
    return 0;
}
"""


@compiled
def test_threads_and_fork(library: Path) -> None:
    """Opened for the first time by several threads at once; closed by several, which one of them does; forked."""
    target, source = library / "threads", library / f"threads.{os.getpid()}.c"
    source.write_text(THREADS)
    half = library / f"threads.{os.getpid()}"
    compile_host(half, source, library=library).replace(target)
    source.unlink()
    done = run_host(target)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 0\n", "")


@compiled
def test_the_gil_and_the_door(library: Path) -> None:
    """A Python host may hold the GIL in every call, and a finalizer may close a machine inside fx_open."""
    code = """
import ctypes, sys, threading
from fastexit.embed import cabi
from fastexit.layout import ABI_VERSION
place = sys.argv[1]
doors = [ctypes.PyDLL(place), ctypes.CDLL(place)]
config = b"".join(int(n).to_bytes(4, "little") for n in (72, ABI_VERSION, 1, 0, 0, 1, *[0] * 12))

def open_by(door):
    m = ctypes.c_void_p()
    assert door.fx_open(config, None, ctypes.byref(m), None) == 0
    return m

sys.setswitchinterval(1e-5)
def work(door):
    for _ in range(100):
        assert door.fx_close(open_by(door)) == 0

threads = [threading.Thread(target=work, args=(doors[i % 2],)) for i in range(4)]
for t in threads: t.start()
for t in threads: t.join()
spare, header = open_by(doors[0]), cabi.header
def closing(*args):
    print(doors[0].fx_close(spare), doors[1].fx_close(spare))
    return header(*args)
cabi.header = closing
assert doors[1].fx_close(open_by(doors[1])) == 0
"""
    target = library / build.LIBRARY
    done = subprocess.run(
        [sys.executable, "-c", code, str(target)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 -4\n", "")


# -------------------------------------------------------------------------------------------------------- the command
@compiled
def test_build_and_options(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command writes, what cflags and libs print, here and for the directory that was built last."""
    need_compiler()
    monkeypatch.chdir(tmp_path)
    assert main(["embed", "build", "-o", "fx", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = {"libfastexit.so", "fastexit.pc", *cabi.SHIPPED}
    names |= {"fastexit-config.cmake", "fastexit-config-version.cmake"}
    assert {Path(path).name for path in report["files"]} == names == {path.name for path in Path("fx").iterdir()}
    for step in ("cflags", "libs"):
        assert main(["embed", step, "-o", "fx"]) == 0
        assert capsys.readouterr().out.strip() == report[step]
        assert main(["embed", step]) == 0
        assert capsys.readouterr().out.strip() == report[step]
    for name in cabi.SHIPPED:
        assert (tmp_path / "fx" / name).read_bytes() == (ROOT / "native" / name).read_bytes()
    program, shown = first_blocks("c", "text")
    (tmp_path / "main.c").write_text(program)
    demo = compile_host(tmp_path / "demo", tmp_path / "main.c", library=tmp_path / "fx")
    done = run_host(demo)
    assert (done.returncode, done.stdout, done.stderr) == (0, shown, "")


@compiled
def test_the_lines_of_the_page_work_in_a_folder_with_a_space(library: Path, tmp_path: Path) -> None:
    """All that docs/embedding.md has a shell do; with pkg-config and cmake where those are here."""
    page = (ROOT / "docs" / "embedding.md").read_text()
    program, cmake, shown = first_blocks("c", "cmake", "text")
    first, build_and_run, others, cpp, *_ = re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL)
    folder = tmp_path / "two words"
    tool = folder / "venv" / "bin" / "fastexit"
    tool.parent.mkdir(parents=True)
    tool.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fastexit "$@"\n')
    tool.chmod(0o755)
    (folder / "main.c").write_text(program)
    (folder / "CMakeLists.txt").write_text(cmake)

    def shell(lines: str) -> str:
        done = subprocess.run(["sh", "-ec", lines], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    if not shutil.which("cc"):
        pytest.skip("no cc")
    shell(first.splitlines()[-1])
    assert shell(build_and_run) == shown
    with_pkg_config, with_cmake = others.splitlines()
    if shutil.which("pkg-config"):
        shell(f"rm demo; {with_pkg_config}")
        assert shell("./demo") == shown
    if shutil.which("cmake"):
        shell(with_cmake)
        assert shell("./build/demo") == shown
    if shutil.which("c++"):
        (folder / "main.cpp").write_text(*first_blocks("cpp"))
        shell(f"rm demo; {cpp}")
        assert shell("./demo") == "vCPU 1 gets vector 0xfd\n"


@pytest.mark.parametrize("name", ["two words", "it's", 'a "name"', "$HOME", "back\\slash", "a;b & c"])
def test_options_are_words_for_a_shell(name: str, tmp_path: Path) -> None:
    """What cflags and libs print, after eval, names the very folder."""
    place = tmp_path / name
    place.mkdir()
    (place / build.LIBRARY).touch()
    for options, words in (
        (build.cflags(place), [f"-I{place}"]),
        (build.libs(place), [f"-L{place}", f"-Wl,-rpath,{place}", "-lfastexit"]),
    ):
        said = subprocess.run(
            ["sh", "-c", 'eval set -- "$1"; printf \'%s\\n\' "$@"', "sh", options],
            capture_output=True,
            text=True,
            check=True,
        )
        assert said.stdout.splitlines() == words


def test_what_is_missing_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    need_compiler()
    monkeypatch.setattr(fastexit, "warmup", lambda _progress=None: {})
    out = str(tmp_path / "fx")

    def refused(*args: str) -> str:
        assert main(["embed", *args]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1, line
        return line

    assert "no libfastexit.so" in refused("cflags", "-o", out)
    assert "no libfastexit.so" in refused("libs", "-o", out)
    assert "--cc: no C compiler 'nowhere'" in refused("build", "-o", out, "--cc", "nowhere")
    with monkeypatch.context() as other:
        other.setenv("CC", "nowhere")
        assert "$CC: no C compiler 'nowhere'" in refused("build", "-o", out)
    assert "--flags: No closing quotation" in refused("build", "-o", out, "--flags='-g")
    assert "false failed" in refused("build", "-o", out, "--cc", "false")
    assert "unknown-option" in refused("build", "-o", out, "--flags=-fno-such-unknown-option")
    assert "cannot create" in refused("build", "-o", "/dev/null/fx")
    monkeypatch.setattr(build.sysconfig, "get_config_vars", lambda: {"Py_ENABLE_SHARED": 0})
    assert "no shared libpython" in refused("build", "-o", out)
    assert not (tmp_path / "fx" / build.LIBRARY).exists()


def test_headers_are_packed() -> None:
    """A wheel can build the library: setup.cfg names every C file, and each is there as package data."""
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    patterns = [p.strip() for p in setup["options.package_data"]["fastexit"].split(",")]
    packed = {path for pattern in patterns for path in Path(fastexit.__file__).parent.glob(pattern)}
    assert {cabi.NATIVE / name for name in cabi.SOURCES} == {path for path in packed if path.parent == cabi.NATIVE}
