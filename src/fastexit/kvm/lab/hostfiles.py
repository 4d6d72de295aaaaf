"""Files of this machine for one of the lab: this Python, fastexit and what it imports, programs, their libraries.

Models: nothing. Everything keeps its path. Modules bring their byte code along, so that an emulated CPU compiles none:
it says that nobody is to compare it with its source, whose time an archive does not keep on every kernel.
"""

from __future__ import annotations

import hashlib
import marshal
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from importlib import metadata
from importlib.machinery import SourceFileLoader
from importlib.util import MAGIC_NUMBER, cache_from_source, find_spec, source_hash
from pathlib import Path

from fastexit.kvm.lab.initramfs import DIRECTORY, FILE, LINK, PROGRAM, Entry, parts

FORMAT = 1
"""Of a kept archive: another one is another file."""
LEFT_OUT = frozenset(
    ("__pycache__", "ensurepip", "idlelib", "lib2to3", "site-packages", "dist-packages", "test", "tests", "tkinter")
)
"""Folders that no command of ours needs."""
NEEDED = ("cffi", "llvmlite", "numba", "numpy", "rich")
"""What fastexit imports, where no package says so."""
KEPT_ARCHIVES = 2
ELF = b"\x7fELF"
_UNCHECKED = (1).to_bytes(4, "little")
"""Byte code that belongs to its source by a hash which nobody compares (PEP 552)."""
_NAME = re.compile(r"[\w.-]+")
_LIBRARY = re.compile(r"(?:=> )?(/\S+) \(0x")


class Tree:
    """Files by the path that they will have, each once."""

    def __init__(self) -> None:
        self.files: dict[str, Path] = {}
        self.links: dict[str, str] = {}

    def add(self, path: Path) -> None:
        """A file under its own path, or a folder without what is left out; a link leads to where it leads here."""
        path = Path(os.path.abspath(path))
        if path.is_dir():
            for folder, names, files in os.walk(path):
                names[:] = [name for name in names if name not in LEFT_OUT]
                for name in files:
                    self.add(Path(folder) / name)
            return
        for _ in range(40):  # as many links as the kernel follows
            if not path.is_symlink():
                break
            target = os.readlink(path)
            self.links[str(path)] = target
            path = Path(os.path.abspath(path.parent / target))
        if path.is_file() and path.suffix not in (".a", ".pyc"):
            self.files[str(path)] = path

    def add_libraries(self) -> None:
        """What the dynamic linker loads along with the programs and libraries that are here."""
        elves = [name for name, path in self.files.items() if _is_elf(path)]
        for name in libraries(elves):
            self.files.setdefault(name, Path(name))

    def key(self) -> str:
        """Changes when a file does."""
        digest = hashlib.sha256(repr((FORMAT, sys.version, sorted(self.links.items()))).encode())
        for name in sorted(self.files):
            found = self.files[name].stat()
            digest.update(f"{name} {found.st_size} {found.st_mtime_ns}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]

    def entries(self) -> Iterator[Entry]:
        """For an archive: folders before what is in them."""
        made: set[str] = set()
        for name, target in sorted(self.links.items()):
            yield from folders(name, made)
            yield Entry(name[1:], LINK, os.fsencode(target))
        for name, path in sorted(self.files.items()):
            if name in self.links:
                continue
            yield from folders(name, made)
            data = path.read_bytes()
            yield Entry(name[1:], PROGRAM if os.access(path, os.X_OK) else FILE, data)
            code = _byte_code(name, data) if path.suffix == ".py" else None
            if code is not None:
                kept = cache_from_source(name)
                yield from folders(kept, made)
                yield Entry(kept[1:], FILE, code)


def folders(name: str, made: set[str]) -> Iterator[Entry]:
    """The folders that a file is in, but for those that are ``made``."""
    for folder in reversed(Path(name).parents[:-1]):
        if str(folder) not in made:
            made.add(str(folder))
            yield Entry(str(folder)[1:], DIRECTORY)


def _is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == ELF


def libraries(names: Iterable[str]) -> set[str]:
    """Shared libraries of programs and libraries, the dynamic linker among them; nothing where there is no ldd."""
    asked = list(names)
    if not asked or shutil.which("ldd") is None:
        return set()
    done = subprocess.run(["ldd", *asked], capture_output=True, text=True, check=False)
    return set(_LIBRARY.findall(done.stdout))


def _byte_code(name: str, source: bytes) -> bytes | None:
    """A module's, kept or compiled now; None for a file that is no module of this Python."""
    try:
        code = SourceFileLoader(Path(name).stem, name).get_code(Path(name).stem)
    except (SyntaxError, ValueError, ImportError):
        return None
    return MAGIC_NUMBER + _UNCHECKED + source_hash(source) + marshal.dumps(code)


# ------------------------------------------------------------------------------------------------------------- Python


def python() -> Tree:
    """This interpreter, its standard library, and the packages that fastexit imports, with their libraries."""
    tree = Tree()
    executable = Path(sys.executable)
    tree.add(executable)
    for place in {executable.parent.parent, *Path(sys.executable).parents[:2]}:
        if (place / "pyvenv.cfg").is_file():
            tree.add(place / "pyvenv.cfg")
    for name in ("stdlib", "platstdlib"):
        tree.add(Path(sysconfig.get_path(name)))
    real = Path(os.path.realpath(executable))
    tree.add(real)
    for path in sorted(_of_packages(requirements())):
        tree.add(path)
    tree.add_libraries()
    if Path("/etc/ld.so.cache").is_file():
        tree.add(Path("/etc/ld.so.cache"))
    return tree


def requirements(package: str = "fastexit") -> list[str]:
    """Distributions that one needs, and what those need; extras aside."""
    found: list[str] = []
    wanted = [package]
    while wanted:
        name = wanted.pop()
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            lines = list(NEEDED) if name == package else []
        for line in lines:
            asked = _NAME.match(line)
            if asked and "extra ==" not in line and asked[0] not in found:
                found.append(asked[0])
                wanted.append(asked[0])
    return found


def _of_packages(names: Iterable[str]) -> Iterator[Path]:
    for name in names:
        try:
            listed = metadata.files(name)
        except metadata.PackageNotFoundError:
            continue
        if listed is None:  # a distribution's package has no list
            spec = find_spec(name.replace("-", "_"))
            yield from map(Path, (spec.submodule_search_locations if spec else None) or ())
            continue
        for file in listed:
            if not LEFT_OUT.intersection(file.parts) and ".." not in file.parts:
                yield Path(str(file.locate()))


def archive(tree: Tree, where: Path, name: str) -> Path:
    """A tree's archive, made when it is not there yet; older ones of the same name go but for one."""
    made = where / f"{name}-{tree.key()}.cpio"
    if made.exists():
        made.touch()
        return made
    where.mkdir(parents=True, exist_ok=True)
    scratch = made.with_name(f"{made.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            file.writelines(parts(tree.entries()))
        scratch.replace(made)
    finally:
        scratch.unlink(missing_ok=True)
    there = sorted(where.glob(f"{name}-*.cpio"), key=lambda path: path.stat().st_mtime)
    for old in there[:-KEPT_ARCHIVES]:
        old.unlink(missing_ok=True)
    return made
