"""Kernels of the lab: from a distribution's packages, or anybody's own build.

Models: nothing. A kernel is an image and the modules that KVM is. Debian's are got by apt with a state of its own, so
nothing is installed and nothing of the system's changes; they stay in the user's cache.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastexit.checks import quoted

MODULES = {"svm": ("irqbypass", "kvm", "kvm-amd"), "vmx": ("irqbypass", "kvm", "kvm-intel")}
"""What has to be loaded, in this order."""
WANTED = sorted({name for names in MODULES.values() for name in names})
FLAVOUR = "cloud-amd64"
SYSTEM_SOURCES = Path("/etc/apt/sources.list"), Path("/etc/apt/sources.list.d")
_MODULE = re.compile(r"([\w-]+)\.ko(\.xz|\.gz|\.zst)?")
_PACKAGE = re.compile(r"linux-(?:image|binary)-(\d[\w.+-]*-" + FLAVOUR + r")(?:-unsigned)?")
_UPSTREAM = re.compile(r"\d+(?:\.\d+)*")


class KernelMissing(OSError):
    """A kernel that is not in the cache, or that no package has; its text is one line that says what to do."""

    def __str__(self) -> str:
        return self.strerror or "no such kernel"


@dataclass(frozen=True)
class Kernel:
    """One kernel: ``version`` is upstream's (6.1.192), ``release`` what uname says of it."""

    version: str
    release: str
    image: Path
    modules: Path
    package: str = ""

    def module(self, name: str) -> bytes:
        """A module, unpacked; KernelMissing where this kernel has none of that name."""
        for path in sorted(self.modules.rglob("*.ko*")):
            found = _MODULE.fullmatch(path.name)
            if found and found[1].replace("_", "-") == name:
                return _unpacked(path.read_bytes(), found[2] or "")
        raise KernelMissing(0, f"kernel {self.release} has no module {name} below {str(self.modules)!r}")

    def as_dict(self) -> dict[str, str]:
        """Everything as text, for JSON."""
        return {name: str(value) for name, value in vars(self).items()}


def _unpacked(data: bytes, ending: str) -> bytes:
    if ending == ".xz":
        return lzma.decompress(data)
    if ending == ".gz":
        return gzip.decompress(data)
    if ending == ".zst":
        return _piped(["zstd", "-dc"], data, "modules are packed by zstd, which is not installed")
    return data


def _piped(command: Sequence[str], data: bytes, missing: str) -> bytes:
    try:
        return subprocess.run(command, input=data, capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise KernelMissing(0, missing) from None
    except subprocess.CalledProcessError as error:
        raise KernelMissing(0, f"{command[0]}: {_last_line(error.stderr.decode(errors='replace'))}") from None


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason given")


def directory() -> Path:
    """Where kernels are kept: ``$FASTEXIT_KERNELS_DIR``, otherwise ``fastexit/kernels`` in the user's cache."""
    named = os.environ.get("FASTEXIT_KERNELS_DIR")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "fastexit" / "kernels"


def own(image: str | Path, modules: str | Path) -> Kernel:
    """Anybody's own build: its image, and a directory that has KVM's modules somewhere below."""
    image, modules = Path(image), Path(modules)
    if not image.is_file():
        raise KernelMissing(0, f"no kernel image {str(image)!r}")
    if not modules.is_dir():
        raise KernelMissing(0, f"no directory of modules {str(modules)!r}")
    release = image_release(image)
    found = _UPSTREAM.match(release)
    return Kernel(found[0] if found else release, release, image, modules)


def image_release(image: Path) -> str:
    """The release that a bzImage's setup header names (Documentation/arch/x86/boot.rst); the file's name without."""
    data = image.read_bytes()[: 1 << 16]
    if data[0x202:0x206] == b"HdrS":
        at = int.from_bytes(data[0x20E:0x210], "little") + 0x200
        text = data[at:].split(b"\0")[0].split(b" ")[0].decode(errors="replace")
        if text[:1].isdigit():
            return text
    return image.name.removeprefix("vmlinuz-")


# -------------------------------------------------------------------------------------------------------------- cache


def cached(where: Path | None = None) -> list[Kernel]:
    """What is in the cache, oldest version first."""
    kernels = []
    for path in (where or directory()).glob("*/kernel.json"):
        try:
            one = json.loads(path.read_text())
            kernels.append(
                Kernel(one["version"], one["release"], path.parent / "vmlinuz", path.parent, one.get("package", ""))
            )
        except (ValueError, KeyError, OSError):
            continue  # half there: whoever wants it gets it again
    return sorted(kernels, key=lambda kernel: _number(kernel.version))


def find(version: str, where: Path | None = None) -> Kernel:
    """The newest cached kernel of a series (6.1), a version (6.1.192) or a release; KernelMissing says what to do."""
    there = cached(where)
    found = [kernel for kernel in there if kernel.release == version or _is_of(kernel.version, version)]
    if found:
        return found[-1]
    have = ", ".join(kernel.version for kernel in there) or "none"
    raise KernelMissing(
        0, f"kernel {quoted(version)} is not in the cache (there: {have}): fastexit kernels get {quoted(version)[1:-1]}"
    )


def _number(version: str) -> tuple[int, ...]:
    found = _UPSTREAM.match(version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _is_of(version: str, wanted: str) -> bool:
    """Whether a version is of a series: 6.1.192 of 6.1 and of 6.1.192, not of 6."""
    return version == wanted or (wanted.count(".") > 0 and version.startswith(wanted + "."))


def keep(debs: Iterable[Path], where: Path | None = None, package: str = "") -> Kernel:
    """Puts what a lab needs of a kernel's packages into the cache."""
    where = where or directory()
    where.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=where) as scratch:
        made = Path(scratch) / "kernel"
        made.mkdir()
        files = list(debs)
        for deb in files:
            _take(deb, made)
        if not (made / "vmlinuz").exists():
            raise KernelMissing(0, f"no kernel image in {', '.join(deb.name for deb in files) or 'no package'}")
        release = image_release(made / "vmlinuz")
        if not any(made.glob("kvm.ko*")):
            raise KernelMissing(0, f"the packages of {release} have no KVM modules")
        text = {"version": _version_of(files[0]), "release": release, "package": package or _package_names(files)}
        (made / "kernel.json").write_text(json.dumps(text) + "\n")
        place = where / release
        shutil.rmtree(place, ignore_errors=True)
        made.replace(place)
    return find(release, where)


def _version_of(deb: Path) -> str:
    """Upstream's version, from NAME_EPOCH%3aVERSION-REVISION_ARCHITECTURE.deb."""
    return deb.name.split("_")[1].split("%3a")[-1].split("-")[0]


def _package_names(debs: Iterable[Path]) -> str:
    return " ".join(deb.name.split("_")[0] for deb in debs)


def _take(deb: Path, into: Path) -> None:
    """Image and modules of one package, whatever directories it has them in."""
    with tarfile.open(fileobj=io.BytesIO(_data_of(deb))) as tar:
        for member in tar:
            name = member.name.rsplit("/", 1)[-1]
            found = _MODULE.fullmatch(name)
            is_module = found is not None and found[1] in WANTED
            if not member.isfile() or not (is_module or name.startswith("vmlinuz")):
                continue
            data = tar.extractfile(member)
            assert data is not None
            (into / (name if is_module else "vmlinuz")).write_bytes(data.read())


def unpack(deb: Path, into: Path) -> None:
    """Every file of a package."""
    with tarfile.open(fileobj=io.BytesIO(_data_of(deb))) as tar:
        tar.extractall(into, filter="tar")


def _data_of(deb: Path) -> bytes:
    """The files of a package as a tar archive: a member of an ar archive, packed in some way."""
    data = deb.read_bytes()
    at = 8
    while data[:8] == b"!<arch>\n" and at + 60 <= len(data):
        name, size = data[at : at + 16].decode().strip().rstrip("/"), int(data[at + 48 : at + 58])
        if name.startswith("data.tar"):
            return _unpacked(data[at + 60 : at + 60 + size], Path(name).suffix.replace(".tar", ""))
        at += 60 + size + (size & 1)
    raise KernelMissing(0, f"{deb.name} is no Debian package")


# ---------------------------------------------------------------------------------------------------------------- apt


@dataclass(frozen=True)
class Apt:
    """How apt is asked: with lists and archives in the cache, and sources of its user's choice.

    ``suites`` are asked of the mirror that the system itself has; ``sources`` is a file that names others;
    ``options`` go to apt as they are. With none of the three the system's own suites are asked.
    """

    where: Path
    suites: tuple[str, ...] = ()
    sources: Path | None = None
    options: tuple[str, ...] = ()

    def update(self) -> None:
        """Brings the lists up to date."""
        self.run("apt-get", "update", "-qq")

    def versions(self) -> dict[str, list[str]]:
        """Upstream versions of kernels that the lists have, each with the packages that make it up."""
        return choose(self.run("apt-cache", "dumpavail"))

    def download(self, names: Sequence[str], into: Path) -> list[Path]:
        """Packages as files."""
        self.run("apt-get", "download", "-qq", *names, cwd=into)
        return sorted(into.glob("*.deb"))

    def run(self, program: str, *arguments: str, cwd: Path | None = None) -> str:
        """What one of apt's programs prints; KernelMissing with its reason."""
        command = [program, *self._options(), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
        except FileNotFoundError:
            raise KernelMissing(0, f"no {program} here: give --image and --modules instead") from None
        if done.returncode:
            errors = [line[3:] for line in done.stderr.splitlines() if line.startswith("E: ")]
            raise KernelMissing(0, f"{program} {arguments[0]}: {(errors or [_last_line(done.stderr)])[0]}")
        return done.stdout

    def _options(self) -> list[str]:
        lists, archives = self.where / "lists", self.where / "archives"
        for path in (lists / "partial", archives / "partial"):
            path.mkdir(parents=True, exist_ok=True)
        given = {
            "Dir::State::Lists": lists,
            "Dir::Cache::archives": archives,
            "Dir::Cache::pkgcache": "",
            "Dir::Cache::srcpkgcache": "",
            "Acquire::Languages": "none",
            "APT::Sandbox::User": "root" if os.geteuid() == 0 else "",
        }
        sources = self.sources
        if sources is not None and not sources.is_file():
            raise KernelMissing(0, f"no file of apt sources {str(sources)!r}")
        if self.suites:
            sources = self.where / "sources.list"
            sources.write_text(sources_of(self.suites, SYSTEM_SOURCES))
        if sources is not None:
            given |= {"Dir::Etc::sourcelist": sources.resolve(), "Dir::Etc::sourceparts": "-"}
        options = [f"{name}={value}" for name, value in given.items()]
        return [part for option in (*options, *self.options) for part in ("-o", option)]


def choose(text: str) -> dict[str, list[str]]:
    """Kernels among the packages that ``apt-cache dumpavail`` lists: upstream version to packages, the newest of each.

    From 6.19 on the image is in linux-binary-* and KVM in linux-modules-*; before, linux-image-* has both, and packages
    without modules are of no use.
    """
    packages: dict[str, str] = {}
    for paragraph in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if line[:1].strip() and ": " in line)
        name, version = fields.get("Package", ""), fields.get("Version", "")
        if FLAVOUR in name and not name.endswith("-dbg"):
            packages[name] = max(version, packages.get(name, ""), key=_number)
    found: dict[str, tuple[tuple[int, ...], list[str]]] = {}
    for name, version in packages.items():
        is_kernel = _PACKAGE.fullmatch(name)
        if is_kernel is None or name.endswith("-unsigned"):
            continue
        release = is_kernel[1]
        upstream = version.split(":")[-1].split("-")[0]
        names = [name]
        if name.startswith("linux-binary-"):
            names.append(f"linux-modules-{release}")
            if names[1] not in packages:
                continue
        elif _number(upstream) >= (6, 19):
            continue
        order = tuple(int(part) for part in re.findall(r"\d+", release))
        if upstream not in found or found[upstream][0] < order:
            found[upstream] = (order, names)
    return {version: found[version][1] for version in sorted(found, key=_number)}


def newest(version: str, there: dict[str, list[str]]) -> str:
    """The newest version of a series that packages have; KernelMissing names those that there are."""
    found = [one for one in there if _is_of(one, version)]
    if not found:
        have = ", ".join(there) or "none"
        raise KernelMissing(
            0, f"no package of kernel {quoted(version)} (there: {have}); other suites: --suite bullseye, --sources FILE"
        )
    return found[-1]


def get(version: str, apt: Apt, where: Path | None = None) -> Kernel:
    """A kernel's packages from apt's sources into the cache; the kernel that is there already, if it is the one."""
    where = where or directory()
    apt.update()
    there = apt.versions()
    chosen = newest(version, there)
    for kernel in cached(where):
        if kernel.version == chosen and kernel.package == " ".join(there[chosen]):
            return kernel
    with tempfile.TemporaryDirectory(dir=where) as scratch:
        debs = apt.download(there[chosen], Path(scratch))
        return keep(debs, where, " ".join(there[chosen]))


def sources_of(suites: Sequence[str], places: Iterable[Path], codename: str | None = None) -> str:
    """A sources list of other suites of the mirror that the system itself uses for its own, ``codename``.

    Security suites are asked of the mirror that the system has for those.
    """
    codename = codename or _codename()
    mirrors: dict[bool, tuple[str, str]] = {}
    for path in places:
        for one in sorted(path.iterdir()) if path.is_dir() else [path] * path.is_file():
            for uri, suite, signed_by in _sources(one):
                if suite.startswith(codename):
                    mirrors.setdefault("security" in suite, (uri, signed_by))
    lines = []
    for suite in suites:
        uri, signed_by = mirrors.get("security" in suite) or mirrors.get(False) or ("", "")
        if not uri:
            raise KernelMissing(0, f"apt's sources have no mirror of {codename}: name sources by --sources FILE")
        lines.append(f"deb {f'[signed-by={signed_by}] ' if signed_by else ''}{uri} {suite} main\n")
    return "".join(lines)


def _codename() -> str:
    """The system's own suite."""
    try:
        found = re.search(r'^VERSION_CODENAME="?(\w+)', Path("/etc/os-release").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else "stable"


def _sources(path: Path) -> list[tuple[str, str, str]]:
    """URIs, suites and keyrings of a file of sources, in either form."""
    text = path.read_text(errors="replace")
    found = []
    if path.suffix == ".sources":
        for paragraph in text.split("\n\n"):
            fields = dict(line.split(":", 1) for line in paragraph.splitlines() if ":" in line and line[0] != "#")
            keyring = fields.get("Signed-By", "").strip()
            for uri in fields.get("URIs", "").split():
                found += [(uri, suite, keyring) for suite in fields.get("Suites", "").split()]
        return found
    for line in text.splitlines():
        words = re.sub(r"\[[^]]*\]", "", line).split()
        if len(words) > 2 and words[0] == "deb":
            keyrings = re.search(r"signed-by=([^] ]+)", line)
            found.append((words[1], words[2], keyrings[1] if keyrings else ""))
    return found
