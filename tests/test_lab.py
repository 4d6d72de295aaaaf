"""The lab of real kernels: archives, records, packages, what is missing in one line; and kernels, where they are."""

from __future__ import annotations

import io
import json
import lzma
import re
import shutil
import struct
import tarfile
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fastexit as fx
from fastexit import cli
from fastexit import regs as r
from fastexit.kvm import comparison, judge
from fastexit.kvm import ioctl as K
from fastexit.kvm import operations as ops
from fastexit.kvm.device import KvmUnavailable, upstream
from fastexit.kvm.lab import initramfs, kernels, lastwords, qemu, traces, vmxmachine, wire
from fastexit.kvm.lab.device import LATCHED_INIT_AT, SEEN, LabDevice, ioctl_record
from fastexit.kvm.lab.turnstile import Turnstile
from fastexit.kvm.lab.wire import Answer, Ask
from fastexit.trace.replay import replay
from strategies import JIT

LAB = Path(wire.__file__).parent


def one_line(text: str) -> str:
    (line,) = text.splitlines()
    assert line.startswith("fastexit: ")
    return line


# ----------------------------------------------------------------------------------------------------------- initramfs


def entries(archive: bytes) -> list[tuple[str, int, bytes, tuple[int, int]]]:
    """An archive as the kernel reads it."""
    found, at = [], 0
    while True:
        assert archive[at : at + 6] == b"070701"
        assert at % 4 == 0
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        name = archive[at + 110 : at + 110 + fields[11] - 1].decode()
        assert archive[at + 110 + fields[11] - 1] == 0
        at = (at + 110 + fields[11] + 3) & ~3
        if name == "TRAILER!!!":
            return found
        found.append((name, fields[1], archive[at : at + fields[6]], (fields[9], fields[10])))
        at = (at + fields[6] + 3) & ~3


@pytest.mark.parametrize("length", range(5))
def test_an_archive_reads_as_it_was_written(length: int) -> None:
    archive = initramfs.initramfs(b"\x7fELF" + bytes(length), [("kvm.ko", b"m" * length, ""), ("b.ko", b"", "avic=0")])
    by_name = {name: (mode, data, device) for name, mode, data, device in entries(archive)}
    assert by_name["dev/console"] == (0o020600, b"", (5, 1))
    assert by_name["init"] == (0o100755, b"\x7fELF" + bytes(length), (0, 0))
    assert by_name["kvm.ko"][1] == b"m" * length
    assert by_name["modules"][1] == b"/kvm.ko\n/b.ko avic=0\n"


def test_signatures_of_modules_go() -> None:
    signed = b"\x7fELF module" + b"s" * 300 + struct.pack(">BBBBBxxxI", 0, 0, 2, 0, 0, 300) + initramfs.SIGNED
    assert initramfs.unsigned(signed) == initramfs.unsigned(b"\x7fELF module") == b"\x7fELF module"
    assert initramfs.SIGNED not in initramfs.initramfs(b"", [("kvm.ko", signed, "")])


def test_no_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(OSError, match="no C compiler 'no-such-compiler'"):
        initramfs.init_program(tmp_path)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_an_init_that_cannot_be_compiled_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "cc -DSLOTS=?")
    with pytest.raises(OSError, match="the lab's init cannot be compiled") as found:
        initramfs.init_program(tmp_path)
    assert len(str(found.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------- wire


def test_both_sides_have_the_same_numbers() -> None:
    source = (LAB / "init.c").read_text()
    (names,) = re.findall(r"enum op \{ OPEN = 1, (.*?) \};", source)
    assert ["OPEN", *names.split(", ")] == [op.name for op in Ask]
    assert f"READY = {wire.READY:#x}" in source
    assert f"HEADER = {wire.HEADER_BYTES}" in source
    assert f"LOOK_STATES = {wire.LOOK_STATES}, LOOK_SREGS = {wire.LOOK_SREGS}, SET_REGS = {wire.SET_REGS}" in source


def test_records_and_answers() -> None:
    data = wire.pack([(Ask.CLOCK, 0, b""), (Ask.CLOSE, 3, b"\1\2\3\4\5")])
    assert data == struct.pack("<HHI", 13, 0, 0) + struct.pack("<HHI", 2, 3, 5) + b"\1\2\3\4\5\0\0\0"
    answers = struct.pack("<iI", -22, 0) + struct.pack("<iI", 7, 3) + b"abc" + bytes(5)
    assert wire.unpack(answers) == [Answer(-22, b""), Answer(7, b"abc")]


def test_an_msr_filter_takes_its_bitmaps_along() -> None:
    bitmap = K.ffi.new("uint64_t[2]", [5, 6])
    rows = {"flags": 1, "nmsrs": 100, "base": 0x800, "bitmap": bitmap}
    argument = K.ffi.new("struct kvm_msr_filter *", {"ranges": [{}, rows]})
    _, _, payload = ioctl_record(9, K.X86_SET_MSR_FILTER, argument)
    fd, is_bytes, pointers, request, length = struct.unpack_from("<IHHQQ", payload)
    assert (fd, is_bytes, pointers, request) == (9, 1, 1, K.X86_SET_MSR_FILTER)
    where, what = struct.unpack_from("<II", payload, 24)
    data = payload[32:]
    assert len(data) == length
    assert data[what:] == struct.pack("<QQ", 5, 6)
    assert data[where : where + 8] == struct.pack("<Q", int(K.ffi.cast("uintptr_t", bitmap)))


class Echo:
    """A wire that answers each record with its payload."""

    closed = False

    def __init__(self) -> None:
        self.batches: list[int] = []

    def trip(self, records: Any, seconds: float = 0) -> list[Answer]:
        self.batches.append(len(records))
        if any(payload == b"broken" for _, _, payload in records):
            raise wire.WireBroken(0, "gone")
        return [Answer(0, payload) for _, _, payload in records]


def test_threads_share_trips() -> None:
    echo = Echo()
    turnstile = Turnstile(echo)  # type: ignore[arg-type]
    wrong: list[Any] = []
    start = threading.Barrier(8)

    def session(number: int) -> None:
        with turnstile.inside():
            start.wait()
            for n in range(20 + number):
                asked = [(Ask.READ, 0, b"%d/%d" % (number, n)), (Ask.READ, 0, b"more")]
                if [answer.data for answer in turnstile.trip(asked)] != [record[2] for record in asked]:
                    wrong.append((number, n))

    threads = [threading.Thread(target=session, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert not wrong
    assert sum(echo.batches) == 2 * sum(range(20, 28))
    assert echo.batches[0] == 16
    assert len(echo.batches) == 27


def test_everybody_hears_of_a_broken_wire() -> None:
    turnstile = Turnstile(Echo())  # type: ignore[arg-type]
    with turnstile.inside(), pytest.raises(wire.WireBroken, match="gone"):
        turnstile.trip([(Ask.READ, 0, b"broken")])
    assert turnstile.trip([(Ask.READ, 0, b"x")]) == [Answer(0, b"x")]


class Latched:
    """A wire to a kernel with one vCPU, whose INIT waits when it is looked at; each look carries it out."""

    closed = False
    trips = 0

    def trip(self, records: Any, seconds: float = 0) -> list[Answer]:
        self.trips += 1
        return [self.answer(what, payload) for what, _, payload in records]

    def answer(self, what: Ask, payload: bytes) -> Answer:
        if what == Ask.LOOK:
            return Answer(0, struct.pack("<III", 1, LATCHED_INIT_AT // 4, 1 << 8 * (LATCHED_INIT_AT % 4)))
        request = struct.unpack_from("<IHHQQ", payload)[3] if what == Ask.IOCTL else None
        if request == K.CREATE_VM:
            return Answer(5, b"")
        return Answer(0, bytes(SEEN[request][1]) if request in SEEN else b"")


def test_an_init_that_a_look_carried_out_is_over() -> None:
    """The look asked for the page and for events before that: each is right until mp_state has been asked for."""
    device = LabDevice(Latched(), "a kernel")  # type: ignore[arg-type]
    vm, vcpu = device.call(3, K.CREATE_VM), 6
    device.created(vm, vcpu)
    device.watch(vm, states=True)
    device.call(vcpu, K.SET_MP_STATE, K.ffi.new("struct kvm_mp_state *"))
    page, events = K.ffi.new("struct kvm_lapic_state *"), K.ffi.new("struct kvm_vcpu_events *")
    trips = device.wire.trips  # type: ignore[attr-defined]

    def latched() -> int:
        device.call(vcpu, K.GET_LAPIC, page)
        device.call(vcpu, K.GET_VCPU_EVENTS, events)
        return int(events.smi.latched_init)

    assert latched() == latched() == 1
    device.call(vcpu, K.GET_MP_STATE, K.ffi.new("struct kvm_mp_state *"))
    assert device.wire.trips == trips  # type: ignore[attr-defined]
    assert latched() == 0
    assert device.wire.trips == trips + 2  # type: ignore[attr-defined]
    device.call(vcpu, K.SET_MP_STATE, K.ffi.new("struct kvm_mp_state *"))
    assert latched() == 1


# -------------------------------------------------------------------------------------------------------------- kernels


def package(name: str, version: str) -> str:
    return f"Package: {name}\nVersion: {version}\nDescription: a kernel\n more of it\n"


AVAILABLE = "\n".join(
    [
        package("linux-image-6.1.0-9-cloud-amd64", "6.1.90-1"),
        package("linux-image-6.1.0-57-cloud-amd64", "6.1.192-3"),
        package("linux-image-6.1.0-57-cloud-amd64-dbg", "6.1.192-3"),
        package("linux-image-6.1.0-57-amd64", "6.1.192-3"),
        package("linux-image-cloud-amd64", "6.1.192-3"),
        package("linux-image-6.12.43+deb12-cloud-amd64", "6.12.43-1~bpo12+1"),
        package("linux-image-7.3.4+deb13-cloud-amd64", "7.3.4-1"),
        package("linux-binary-7.3.4+deb13-cloud-amd64", "7.3.4-1"),
        package("linux-modules-7.3.4+deb13-cloud-amd64", "7.3.4-1"),
        package("linux-binary-7.0.13+deb13-cloud-amd64", "7.0.13-1"),
    ]
)


def test_packages_of_a_kernel() -> None:
    """One package up to 6.18, image and modules in two later; what has no modules is of no use."""
    assert kernels.choose(AVAILABLE) == {
        "6.1.90": ["linux-image-6.1.0-9-cloud-amd64"],
        "6.1.192": ["linux-image-6.1.0-57-cloud-amd64"],
        "6.12.43": ["linux-image-6.12.43+deb12-cloud-amd64"],
        "7.3.4": ["linux-binary-7.3.4+deb13-cloud-amd64", "linux-modules-7.3.4+deb13-cloud-amd64"],
    }


def test_the_newest_of_a_series() -> None:
    there = kernels.choose(AVAILABLE)
    assert kernels.newest("6.1", there) == "6.1.192"
    assert kernels.newest("6.1.90", there) == "6.1.90"
    with pytest.raises(kernels.KernelMissing, match=r"no package of kernel '7.0' \(there: 6.1.90, .*--suite"):
        kernels.newest("7.0", there)


def test_suites_are_asked_of_the_systems_own_mirror(tmp_path: Path) -> None:
    (tmp_path / "a.sources").write_text(
        "Types: deb\nURIs: mirror://here/debian\nSuites: bookworm bookworm-updates\nComponents: main\n"
        "Signed-By: /keys.gpg\n\nTypes: deb\nURIs: mirror://safe\nSuites: bookworm-security\n"
    )
    (tmp_path / "0.list").write_text("# deb x y z\ndeb [arch=amd64] mirror://elsewhere other main\n")
    text = kernels.sources_of(["bullseye", "trixie-security"], [tmp_path], "bookworm")
    assert (
        text == "deb [signed-by=/keys.gpg] mirror://here/debian bullseye main\ndeb mirror://safe trixie-security main\n"
    )
    with pytest.raises(kernels.KernelMissing, match="--sources FILE"):
        kernels.sources_of(["bullseye"], [tmp_path / "none"], "bookworm")


def bzimage(release: str) -> bytes:
    """So much of an image as says its release."""
    image = bytearray(0x1000)
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x20E, 0x400)
    text = f"{release} (somebody@here) #1 SMP".encode()
    image[0x600 : 0x600 + len(text)] = text
    return bytes(image)


def deb(path: Path, files: dict[str, bytes]) -> Path:
    """A package with these files."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    out = b"!<arch>\n"
    for name, data in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", packed.getvalue())):
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) & 1)
    path.write_bytes(out)
    return path


def test_packages_go_into_the_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    deeper = "./usr/lib/modules/7.3.4+x-cloud-amd64/kernel/arch/x86/kvm"
    debs = [
        deb(
            tmp_path / "linux-binary-7.3.4+x_1%3a7.3.4-1_amd64.deb", {"./boot/vmlinuz-7.3.4": bzimage("7.3.4+x-amd64")}
        ),
        deb(
            tmp_path / "linux-modules-7.3.4+x_7.3.4-1_amd64.deb",
            {f"{deeper}/kvm.ko.xz": lzma.compress(b"kvm"), f"{deeper}/kvm-amd.ko": b"amd", f"{deeper}/other.ko": b""},
        ),
    ]
    kernel = kernels.keep(debs, cache)
    assert (kernel.version, kernel.release) == ("7.3.4", "7.3.4+x-amd64")
    assert kernel.package == "linux-binary-7.3.4+x linux-modules-7.3.4+x"
    assert kernel.module("kvm") == b"kvm"
    assert kernel.module("kvm-amd") == b"amd"
    assert kernels.find("7.3", cache) == kernels.find("7.3.4", cache) == kernels.find("7.3.4+x-amd64", cache) == kernel
    with pytest.raises(kernels.KernelMissing, match="has no module kvm-intel"):
        kernel.module("kvm-intel")
    for unknown in ("7", "7.30", "7.3.40"):
        with pytest.raises(kernels.KernelMissing, match="fastexit kernels get"):
            kernels.find(unknown, cache)
    own = kernels.own(kernel.image, kernel.modules)
    assert (own.version, own.release) == ("7.3.4", "7.3.4+x-amd64")


@pytest.mark.parametrize(
    ("files", "text"),
    [({"./boot/vmlinuz-1": bzimage("1.2.3")}, "no KVM modules"), ({"./usr/kvm.ko": b"x"}, "no kernel image")],
)
def test_packages_that_lack_something(tmp_path: Path, files: dict[str, bytes], text: str) -> None:
    with pytest.raises(kernels.KernelMissing, match=text):
        kernels.keep([deb(tmp_path / "linux-image-1_1.2.3-1_amd64.deb", files)], tmp_path / "cache")
    assert kernels.cached(tmp_path / "cache") == []


def test_patch_levels() -> None:
    amazon = "Linux version 6.1.163-186.299.amzn2023.x86_64 (gcc (Debian 12.2.0-14)) #1 SMP"
    assert upstream(amazon) == "6.1.163"
    assert upstream("Linux version 5.15.0-105-generic (gcc) #115-Ubuntu SMP") == ""


# ------------------------------------------------------------------------------------------------- what is not there


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("FASTEXIT_KERNELS_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("empty_cache")
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["verify", "--kernel", "9.9"], "kernel '9.9' is not in the cache (there: none): fastexit kernels get 9.9"),
        (["kernels", "boot", "6.1\n2"], r"kernel '6.1\n2' is not in the cache"),
        (["kernels", "boot"], "give either a version or an image"),
        (["verify", "--image", "x"], "give both"),
        (["verify", "--image", "x", "--modules", "y"], "no kernel image 'x'"),
        (["verify", "--kernel", "6.1", "--image", "x", "--modules", "y"], "give either a version or an image"),
        (["kernels", "get", "6.1", "--sources", "nowhere"], "no file of apt sources 'nowhere'"),
    ],
)
def test_what_is_missing_is_one_line(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert text in one_line(captured.err)


def test_no_emulator_is_one_line(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (empty_cache / "vmlinuz").write_bytes(bzimage("6.1.192"))
    monkeypatch.setenv("PATH", str(empty_cache))
    command = ["verify", "--image", str(empty_cache / "vmlinuz"), "--modules", str(empty_cache)]
    assert cli.main(command) == 2
    assert "no qemu-system-x86_64 here: the lab needs QEMU" in one_line(capsys.readouterr().err)


def test_traces_are_compared_with_kernels_of_the_lab_alone() -> None:
    with pytest.raises(ValueError, match="kernels of the lab alone"):
        comparison.of_kind(judge.of(fx.Machine), "traces")


# ------------------------------------------------------------------------------------------------------------- judges


def older(**keywords: Any) -> fx.Machine:
    """Somebody's APIC that is not like the newest kernel's."""
    return fx.Machine(**keywords, kernel="6.1", apicv=False)


def newest(**keywords: Any) -> fx.Machine:
    """Somebody's APIC that is."""
    return fx.Machine(**keywords, apicv=False)


@pytest.mark.skipif(not JIT, reason="the same in compiled mode")
def test_anybodys_apic_is_compared() -> None:
    assert fx.kvm.verify(800, other=newest, only="msr").agreed
    found = fx.kvm.verify(4000, other=older, only="msr", shorten=1).divergence
    assert found is not None
    text = found.script()
    compile(text, "story", "exec")
    assert "import older as other" in text
    assert "with closing(other(**KEYWORDS)) as real:" in text


def test_what_is_no_judge() -> None:
    with pytest.raises(TypeError, match="neither a Lab nor something that makes machines"):
        judge.of("6.1")  # type: ignore[arg-type]


class Prepared:
    """A vCPU of the model that begins programs as a real one does."""

    def __init__(self, vcpu: Any) -> None:
        self._vcpu = vcpu

    def __getattr__(self, name: str) -> Any:
        if name == "ready":
            raise AttributeError(name)
        if name in ops.GUEST_OPS:
            ops.set_regs(self._vcpu)
        return getattr(self._vcpu, name)

    def is_flat(self) -> bool:
        return True


def driven(**keywords: Any) -> Any:
    """A machine whose guests are prepared by KVM_SET_REGS, on a kernel where a higher TPR asks for nothing."""
    machine = fx.Machine(**keywords, **PREPARED.keywords())
    return SimpleNamespace(vcpus=[Prepared(v) for v in machine.vcpus], signal_msi=machine.signal_msi)


PREPARED = replace(judge.plain("6.18"), module="kvm_amd", version="6.18.15")
driven.host = PREPARED  # type: ignore[attr-defined]


def test_a_program_begins_with_a_request_for_events() -> None:
    """KVM_SET_REGS makes it: the next entry sees that TPR holds back what waits, and CR8 is no longer written back."""
    base = r.APIC_DEFAULT_PHYS_BASE | r.APICBASE_EN | r.APICBASE_EXTD
    story: list[ops.Op] = [
        *(("ready", i) for i in (0, 1)),
        *(("set_msr", i, r.MSR_APICBASE, base) for i in (0, 1)),
        *(("set_msr", i, r.MSR_X2APIC_BASE + (r.APIC_SPIV >> 4), 0x1FF) for i in (0, 1)),
        ("wrmsr", 1, r.MSR_X2APIC_ICR, r.icr(dest=0, vector=0x45)),
        ("rdmsr", 0, r.MSR_APICBASE),
        ("set_msr", 0, r.MSR_X2APIC_BASE + (r.APIC_TASKPRI >> 4), 0xEC),
        ("rdmsr", 0, r.MSR_APICBASE),
    ]
    assert comparison.replay("guest", {"apic_ids": [0, 1]}, story, other=driven) is None
    machine = driven(apic_ids=[0, 1])
    for op in story:
        ops.apply(machine, op)
    assert machine.vcpus[0].get_msr(r.MSR_X2APIC_BASE + (r.APIC_TASKPRI >> 4)) == 0xEC


def test_smis_become_fixed() -> None:
    """Where a delivery mode can be: ICR, LVTs, messages, pages; nothing else changes."""
    smi = r.DM_SMI << r.ICR_DM_SHIFT
    page = bytearray(1024)
    struct.pack_into("<I", page, r.APIC_LVTPC, smi | 0x31)
    struct.pack_into("<I", page, r.APIC_TMICT, smi)
    changed = ops.without_smi(("set_lapic", 1, bytes(page)))[2]
    assert struct.unpack_from("<I", changed, r.APIC_LVTPC) == (0x31,)
    assert struct.unpack_from("<I", changed, r.APIC_TMICT) == (smi,)
    for op, expected in (
        (("set_msr", 0, r.MSR_X2APIC_ICR, smi | 0x41), ("set_msr", 0, r.MSR_X2APIC_ICR, 0x41)),
        (("wrmsr", 0, 0x832, smi | 0x41), ("wrmsr", 0, 0x832, 0x41)),
        (("mmio_write", 0, 0x301, smi >> 8, 1), ("mmio_write", 0, 0x301, 0, 1)),
        (("signal_msi", 0xFEE0_0000, smi | 0x41), ("signal_msi", 0xFEE0_0000, 0x41)),
    ):
        assert ops.without_smi(op) == expected
    for same in (("set_msr", 0, 0x838, smi), ("wrmsr", 0, r.MSR_X2APIC_ICR, 0x441), ("take", 0)):
        assert ops.without_smi(same) == same


def test_counts_become_0() -> None:
    for op, expected in (
        (("wrmsr", 0, 0x838, 0xFFFF_FFFF), ("wrmsr", 0, 0x838, 0)),
        (("mmio_write", 0, 0x380, 7, 4), ("mmio_write", 0, 0x380, 0, 4)),
        (("mmio_write", 0, 0x3E0, 7, 4), ("mmio_write", 0, 0x3E0, 7, 4)),
    ):
        assert ops.without_count(op) == expected


def test_what_the_emulated_machine_adds_is_left_out() -> None:
    lines = [
        "kvm_fpu: load",
        "kvm_inj_virq: IRQ 0x41",
        "kvm_entry: vcpu 0, rip 0x8000 intr_info 0x80000041 error_code 0x00000000",
        "kvm_exit: vcpu 0 reason npf rip 0x8000 info1 0x4 info2 0x304 intr_info 0x80000041 requests 0x0000000000004000",
        "kvm_inj_virq: IRQ 0x41 [reinjected]",
        "kvm_entry: vcpu 0, rip 0x8000 intr_info 0x80000041 error_code 0x00000000",
        "kvm_exit: vcpu 0 reason io rip 0x2 info1 0x1 info2 0x8002 intr_info 0x00000041 requests 0x0000000000000000",
        "kvm_inj_exception: #GP (0x0)",
        "kvm_entry: vcpu 0, rip 0x2 intr_info 0x8000030d error_code 0x00000000",
    ]
    events = {"kvm_inj_virq", "kvm_entry", "kvm_exit", "kvm_inj_exception"}
    assert traces.plain(lines, events) == [
        "kvm_inj_virq: IRQ 0x41",
        "kvm_entry: vcpu 0, rip intr_info 0x80000041 error_code 0x00000000",
        "kvm_exit: vcpu 0 reason io rip info1 0x1 info2 0 intr_info 0x00000000 requests ?",
        "kvm_inj_exception: #GP (0x0)",
        "kvm_entry: vcpu 0, rip intr_info 0x8000030d error_code 0x00000000",
    ]


def test_kernels_that_do_not_say_that_they_inject_again() -> None:
    """Before 6.1 the line is the same, with the machine's own exit between them or an entry that was given up."""
    entry, injection = "kvm_entry: vcpu 0, rip 0x8000", "kvm_inj_virq: irq 65"
    lines = [injection, injection, entry, "kvm_exit: vcpu 0 reason npf rip 0x8000 info1 0x0", injection, entry]
    lines += ["kvm_exit: vcpu 0 reason hlt rip 0x8000 info1 0x0", injection, entry]
    told = traces.plain(lines, {"kvm_inj_virq", "kvm_entry", "kvm_exit"})
    assert [line.split(":")[0] for line in told] == [
        *("kvm_inj_virq", "kvm_entry", "kvm_exit", "kvm_inj_virq", "kvm_entry"),
    ]


def test_an_entry_that_injects_again_may_leave_at_once() -> None:
    entry = "kvm_entry: vcpu 0, rip 0x8000 intr_info 0x80000041"
    (told,) = traces.plain(
        ["kvm_inj_virq: IRQ 0x41 [reinjected]", entry + traces.IMMEDIATE], {"kvm_entry", "kvm_inj_virq"}
    )
    plain = entry.replace(" 0x8000 ", " ")
    assert traces.same(plain, told)
    assert traces.same(plain + traces.IMMEDIATE, told)
    assert traces.same(told, told)
    assert not traces.same(plain, plain + traces.IMMEDIATE)
    assert not traces.same(plain.replace("41", "42"), told)


# ------------------------------------------------------------------------------------------------------ real kernels


def why_no_lab() -> str | None:
    """Why no kernel can be booted; tests never get one."""
    if shutil.which(qemu.EMULATOR) is None:
        return f"no {qemu.EMULATOR}"
    if not kernels.cached():
        return "no kernel in the cache: fastexit kernels get 6.1"
    return None


WHY_NO_LAB = why_no_lab()
lab_is_there = pytest.mark.skipif(WHY_NO_LAB is not None, reason=WHY_NO_LAB or "")


@lab_is_there
@pytest.mark.skipif(not JIT, reason="the same in compiled mode")
def test_a_kernel_boots_and_answers() -> None:
    """The quickest one there is: what it is, MSRs, an interrupt taken by real code, and the same as a script asks."""
    oldest = kernels.cached()[0]
    with fx.kvm.Lab(oldest.version) as lab:
        assert lab.host.release == oldest.release
        assert lab.host.version == oldest.version
        assert lab.host.module == "kvm_amd"
        assert (lab.host.smm, lab.host.nrips, lab.host.maxphyaddr) == (True, False, 40)
        with lab.oracle(2) as vm:
            vm.boot_x2apic()
            assert vm.vcpus[0].set_msr(r.MSR_X2APIC_ICR, r.icr(dest=1, vector=0x41))
            assert vm.vcpus[1].take() == 0x41
            assert vm.vcpus[1].take() is None
            assert vm.vcpus[0].rdmsr(0x802) == 0
            with pytest.raises(ValueError, match="taken"):
                vm.add_vcpu(1)
    assert vm.vcpus[0].vcpu_id == 0
    vm.close()  # the machine is gone already


def test_what_a_machine_said_has_no_screen_codes_and_no_stamps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line of it; a crash has more to tell, which is kept."""
    kept = tmp_path / "kernels"
    monkeypatch.setenv("FASTEXIT_KERNELS_DIR", str(kept))
    said = b"\x1bc\x1b[?7l\x1b[2J\x1b[0mSeaBIOS\r\n\x1b[2J[   31.949528] Oops: int3: 0000 [#1]\n[   31.95] CPU: 1\n"
    (tmp_path / "console").write_bytes(said)
    assert qemu.Emulated(["true"], tmp_path, ()).why_ended() == "Oops: int3: 0000 [#1]"
    kept.mkdir()
    words = kept / lastwords.KEPT
    assert qemu.Emulated(["true"], tmp_path, ()).why_ended() == f"Oops: int3: 0000 [#1] (all of it: {words})"
    assert words.read_bytes() == said


def test_what_bochs_says_last_is_its_kernels_crash_before_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTEXIT_KERNELS_DIR", str(tmp_path))

    def ended() -> str:
        machine = vmxmachine._Emulated(["true"], {}, tmp_path)
        with pytest.raises(KvmUnavailable, match=r"the lab's machine ended: ") as found:
            machine.until("ready", 60)
        machine.end()
        return str(found.value).partition("ended: ")[2]

    assert ended() == "nothing was said"
    (tmp_path / "log").write_text("00000000000e[      ] >>PANIC<< no BIOS\nlast\n")
    assert ended() == "00000000000e[      ] >>PANIC<< no BIOS"
    (tmp_path / "log").write_text("last\n")
    (tmp_path / "console").write_text("[    1.0] first\r\n[    2.0] then\r\n")
    assert ended() == "then"
    (tmp_path / "console").write_text("[    1.0] BUG: bad\n[    2.0] RIP: there\n")
    assert ended() == f"BUG: bad (all of it: {tmp_path / lastwords.KEPT})"
    assert (tmp_path / lastwords.KEPT).read_bytes() == (tmp_path / "console").read_bytes()


@lab_is_there
@pytest.mark.skipif(not JIT, reason="the same in compiled mode")
def test_a_panic_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "initramfs", lambda init, modules: initramfs.initramfs(b"no program", modules))
    with pytest.raises(KvmUnavailable, match=r"did not come up: .*(panic|init)") as found:
        fx.kvm.Lab(kernels.cached()[0].version)
    assert len(str(found.value).splitlines()) == 1


@lab_is_there
@pytest.mark.long
@pytest.mark.parametrize("version", [kernel.version for kernel in kernels.cached()])
def test_models_are_like_their_kernels(version: str) -> None:
    """A slice of what `make verify-kernels` compares."""
    with fx.kvm.Lab(version) as lab:
        kinds = {"msr": 2000, "guest": 1000, "runs": 1000, "timers": 320, "traces": 1000, "hyperv": 1000}
        for kind, operations in kinds.items():
            report = fx.kvm.verify(operations, other=lab, only=kind)
            assert report.divergence is None, report.divergence.script()
            assert report.agreed


@lab_is_there
@pytest.mark.long
@pytest.mark.parametrize("mode", ["--x2apic", None])
def test_a_windows_guest_is_recorded_and_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str | None
) -> None:
    kernel, path = kernels.cached()[-1], tmp_path / "guest.trace.xz"
    options = ["--output", str(path), "--rounds", "10", "--json", *([mode] if mode else [])]
    assert cli.main(["kernels", "windows", kernel.version, *options]) == 0
    told = json.loads(capsys.readouterr().out)
    report = replay(path, vendor="svm")
    assert report.exact, report.mismatches
    assert told["counts"]["IPI_MSR"] == report.ipi.total > 20
    assert told["release"] == kernel.release


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["6.12", "--vendor", "vmx", "--output", "x"], "SVM lab"),
        (["--output", "x"], "either a version"),
        (["6.12", "--output", "/nowhere/x"], "no directory"),
        (["6.12", "--output", "x", "--rounds", "-1"], "--rounds"),
    ],
)
def test_what_cannot_be_recorded_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], why: str
) -> None:
    monkeypatch.setattr(kernels, "find", lambda version: None)
    assert cli.main(["kernels", "windows", *options]) == 2
    assert why in one_line(capsys.readouterr().err)


@lab_is_there
@pytest.mark.long
def test_a_wrong_model_is_found() -> None:
    """A kernel that is called another one differs soon; the story's script boots the kernel by itself."""
    newest = kernels.cached()[-1]
    with fx.kvm.Lab(newest.version) as lab:
        object.__setattr__(lab.host, "version", "")
        object.__setattr__(lab.host, "kernel", "5.8")
        found = fx.kvm.verify(20_000, other=lab, only="msr", shorten=20).divergence
    assert found is not None
    text = found.script()
    compile(text, "story", "exec")
    assert f"with fx.kvm.Lab(version='{newest.version}', vendor='svm') as lab, lab.oracle(**KEYWORDS) as real:" in text
