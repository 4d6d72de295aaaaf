"""Make libfastexit: cffi writes the C around the interpreter, the system's compiler makes a shared library of it.

What ends up in the directory: ``libfastexit.so``, its headers, ``fastexit.pc`` and a CMake package. The library belongs
to the interpreter that built it: its libpython is in the run path, the interpreter's path and where fastexit was
imported from are inside; ``FASTEXIT_PYTHON`` names another interpreter at run time.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

import cffi

from fastexit import __version__
from fastexit.embed import cabi
from fastexit.jit import declare

LIBRARY = "libfastexit.so"
MODULE = "_fastexit_embedded"
FLAGS = ("-O2", "-fPIC", "-fvisibility=hidden", "-fno-semantic-interposition", "-pthread")
DEFAULT = "fastexit-embed"

_INIT = f"""
from {MODULE} import ffi
from fastexit.embed import host
host.attach(ffi)
"""
_PYTHON_API = """
int32_t fxp_start(struct fxp_table *table, char *line, uint32_t room);
int32_t fxp_header(const struct fx_config *config, uint64_t *words, char *line, uint32_t room);
int32_t fxp_unpack(const void *data, uint64_t size, uint64_t *words, char *line, uint32_t room);
int32_t fxp_costs(uint64_t *words, const char *costs, char *line, uint32_t room);
int32_t fxp_text(uint64_t *words, const struct fx_trace *record, char *line, uint32_t room);
"""
_PC = """prefix=${pcfiledir}

Name: fastexit
Description: KVM's interrupt exits as a library
Version: @VERSION@
Cflags: -I${prefix}
Libs: -L${prefix} -Wl,-rpath,${prefix} -lfastexit
"""
_CMAKE = """# find_package(fastexit CONFIG) with -Dfastexit_DIR=<this directory>, then link fastexit::fastexit.
if(NOT TARGET fastexit::fastexit)
    add_library(fastexit::fastexit SHARED IMPORTED)
    set_target_properties(fastexit::fastexit PROPERTIES
        IMPORTED_LOCATION "${CMAKE_CURRENT_LIST_DIR}/@LIBRARY@"
        IMPORTED_NO_SONAME TRUE
        INTERFACE_INCLUDE_DIRECTORIES "${CMAKE_CURRENT_LIST_DIR}")
endif()
"""
_CMAKE_VERSION = """set(PACKAGE_VERSION "@VERSION@")
if(PACKAGE_FIND_VERSION VERSION_GREATER PACKAGE_VERSION)
    set(PACKAGE_VERSION_COMPATIBLE FALSE)
else()
    set(PACKAGE_VERSION_COMPATIBLE TRUE)
endif()
"""
_EXPORTS = "{ global: fx_*; local: *; };\n"


class Interpreter(NamedTuple):
    """What a library needs to know of the interpreter that it hosts."""

    python: str
    version: str
    include: Path
    libpython: Path
    soname: str


def interpreter() -> Interpreter:
    """The running one; ValueError says why it cannot be embedded."""
    known = sysconfig.get_config_vars()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if not known.get("Py_ENABLE_SHARED"):
        raise ValueError(
            f"{sys.executable} has no shared libpython, so C cannot host it: use one built --enable-shared"
        )
    include = Path(sysconfig.get_paths()["include"])
    if not (include / "Python.h").is_file():
        raise ValueError(f"no Python.h in {include}: install the development files of Python {version}")
    soname = str(known.get("INSTSONAME") or known["LDLIBRARY"])
    places = [Path(str(known[key])) for key in ("LIBDIR", "LIBPL") if known.get(key)]
    if known.get("MULTIARCH"):
        places[1:1] = [places[0] / str(known["MULTIARCH"])]
    found = next((place / soname for place in places if (place / soname).is_file()), None)
    if found is None:
        raise ValueError(f"no {soname} in {', '.join(map(str, places))}")
    return Interpreter(sys.executable, version, include, found, soname)


def compiler(named: str | None = None) -> list[str]:
    """The C compiler: ``named``, else $CC, else the one that built Python, or cc; ValueError when it is not there."""
    for choice, origin in ((named, "--cc"), (os.environ.get("CC"), "$CC")):
        if choice:
            words = _words(choice, origin)
            if words and shutil.which(words[0]):
                return words
            raise ValueError(f"{origin}: no C compiler {choice!r} here: install it, or name another one")
    for choice in (sysconfig.get_config_var("CC"), "cc", "gcc", "clang"):
        words = shlex.split(choice or "")
        if words and shutil.which(words[0]):
            return words
    raise ValueError("no C compiler: install gcc or clang, or name one with --cc")


def _words(text: str, origin: str) -> list[str]:
    """Words of a command line, as the shell would part them."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}: {text!r}") from None


def _c_string(text: str) -> str:
    return (
        '"'
        + "".join(chr(b) if 32 <= b < 127 and chr(b) not in '"\\?' else f"\\{b:03o}" for b in os.fsencode(text))
        + '"'
    )


def _paths() -> list[str]:
    """Where packages were found here that the interpreter alone would not find: fastexit itself, $PYTHONPATH."""
    home = str(Path(__file__).resolve().parents[2])
    given = [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    return list(dict.fromkeys([home, *given]))


def source(host: Interpreter) -> str:
    """The C source of the library, in one piece."""
    ffi = cffi.FFI()
    ffi.cdef("".join(cabi.declarations(name) for name in (*cabi.HEADERS, cabi.SHIM)))
    ffi.embedding_api(_PYTHON_API)
    defines = {
        "FXP_PYTHON": _c_string(host.python),
        "FXP_PYTHON_VERSION": _c_string(host.version),
        "FXP_LIBPYTHON": _c_string(host.soname),
        "FXP_PATHS": "".join(f"{_c_string(path)}, " for path in _paths()),
        "FXP_VERSION": _c_string(__version__),
    }
    lines = [f"#define {name} {value}" for name, value in defines.items()]
    ffi.set_source(MODULE, "\n".join([*lines, f'#include "{cabi.PARTS[0]}"']))
    ffi.embedding_init_code(_INIT)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "embed.c"
        with contextlib.redirect_stdout(None):  # cffi says what it writes
            ffi.emit_c_code(str(path))
        return path.read_text()


def build(directory: str | Path, cc: str | None = None, flags: str = "") -> list[Path]:
    """Make the library and what belongs to it in a directory: the paths of all files.

    ``cc`` is the compiler, ``flags`` are more options for it. ValueError or OSError says in one line what is missing.
    """
    host, words = interpreter(), compiler(cc)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    directory = directory.resolve()
    target = directory / LIBRARY
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        c, exports, made = (Path(scratch) / name for name in ("fastexit_embed.c", "exports.map", LIBRARY))
        c.write_text(source(host))
        exports.write_text(_EXPORTS)
        libraries = host.libpython.parent
        line = [*words, *FLAGS, *_words(flags, "--flags"), f"-I{host.include}", f"-I{cabi.NATIVE}", str(c), "-shared"]
        line += ["-o", str(made), f"-Wl,-soname,{LIBRARY}", f"-Wl,--version-script={exports}"]
        line += [str(host.libpython), f"-Wl,-rpath,{libraries}", "-ldl"]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            said = next((text for text in done.stderr.splitlines() if "error" in text), done.stderr.strip())
            said = said or "it says nothing"
            raise ValueError(f"{words[0]} failed ({done.returncode}): {said}")
        made.replace(target)
    texts = {"fastexit.pc": _PC, "fastexit-config.cmake": _CMAKE, "fastexit-config-version.cmake": _CMAKE_VERSION}
    for name, text in texts.items():
        (directory / name).write_text(text.replace("@VERSION@", __version__).replace("@LIBRARY@", LIBRARY))
    for name in cabi.SHIPPED:
        shutil.copyfile(cabi.NATIVE / name, directory / name)
    if declare.JIT:
        cabi.addresses()  # compiled now, so that the first fx_open finds them in the cache
    return [target, *(directory / name for name in (*cabi.SHIPPED, *texts))]


def find(directory: str | Path) -> Path:
    """The directory of a library that was built; ValueError when there is none."""
    if not (Path(directory) / LIBRARY).is_file():
        raise ValueError(f"no {LIBRARY} in {str(directory)!r}: fastexit embed build -o {directory}")
    return Path(directory).resolve()


def _note() -> Path | None:
    """Where the place of the last build is kept: beside the compiled kernels of this interpreter."""
    kept = declare.cache_directory()
    return None if kept is None else kept / "embed"


def remember(directory: str | Path) -> None:
    """Note where a library was built, for cflags and libs without a directory."""
    note = _note()
    if note is not None:
        with contextlib.suppress(OSError):
            note.write_text(str(Path(directory).resolve()))


def remembered() -> Path:
    """Where this interpreter built its last library, or the default place."""
    try:
        note = _note()
        return Path(note.read_text() if note else DEFAULT)
    except OSError:
        return Path(DEFAULT)


def cflags(directory: str | Path) -> str:
    """Options to compile a host with, as python3-config prints them."""
    return shlex.join([f"-I{find(directory)}"])


def libs(directory: str | Path) -> str:
    """Options to link a host with; the library is found again at run time."""
    place = find(directory)
    return shlex.join([f"-L{place}", f"-Wl,-rpath,{place}", "-lfastexit"])
