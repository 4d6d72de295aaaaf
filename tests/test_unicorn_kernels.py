"""Kernels on Unicorn's CPUs: what a boot loader starts, a board of one's own devices, kvm-unit-tests where they are."""

from __future__ import annotations

import os
import runpy
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("unicorn", reason="unicorn is not installed")

import fastexit as fx
from conftest import BOUNDS, INTERPRETED
from fastexit.adapters.kvmhost import multiboot
from fastexit.adapters.unicorn import Ended, UnicornHost

EXAMPLE = Path(__file__).parents[1] / "examples" / "unicorn_kernel.py"
KERNELS = os.environ.get("FASTEXIT_KVM_UNIT_TESTS", "")
"""The folder x86/ of a built tree of kvm-unit-tests."""
AT = 0x10_0000

needs_kernels = pytest.mark.skipif(
    not KERNELS or INTERPRETED or BOUNDS,
    reason="kvm-unit-tests, on compiled kernels: FASTEXIT_KVM_UNIT_TESTS=TREE/x86",
)


@pytest.fixture(scope="module")
def boot() -> Callable[..., int]:
    return runpy.run_path(str(EXAMPLE))["main"]


def image(code: bytes) -> bytes:
    """A multiboot kernel without ELF: header, addresses, code."""
    flags = multiboot.WANTS_ADDRESSES
    head = struct.pack("<III", multiboot.MAGIC, flags, -(multiboot.MAGIC + flags) & 0xFFFF_FFFF)
    return head + struct.pack("<5I", AT, AT, 0, 0, AT + 32) + code


def out(port: int, value: int | None = None) -> bytes:
    """OUT of a byte, AL's if none is given."""
    return b"\x66\xba" + struct.pack("<H", port) + (b"" if value is None else b"\xb0" + bytes([value])) + b"\xee"


COUNT = b"\x66\xba\x10\x05\x66\xb8\x05\x00\x66\xef\x66\xba\x11\x05\xec"
"""OUT of a word, 5, to 0x510; IN AL, 0x511: how many CPUs fw_cfg says there are."""


def test_protected_mode_as_a_boot_loader_leaves_it() -> None:
    """INC EAX is a prefix in 64-bit mode; there is no paging, and segments are flat."""
    host = UnicornHost(fx.Machine(vcpus=1), 1 << 20)
    host.load(0x1000, bytes.fromhex("40 a300050000 0f20c0 a304050000 8cd8 a308050000 8925 0c050000 fa f4"))
    host.cpus[0].start(0x1000, rsp=0x8000, bits=32)
    host.cpus[0]["rax"] = 0xFFFF_FFFE
    assert host.run(instructions=100) is Ended.IDLE
    assert struct.unpack_from("<4I", host.memory, 0x500) == (0xFFFF_FFFF, 0x11, 0x10, 0x8000)


def test_no_mode_and_no_address_of_it() -> None:
    cpu = UnicornHost(fx.Machine(vcpus=1), 1 << 20).cpus[0]
    with pytest.raises(ValueError, match="bits 16: 64 or 32"):
        cpu.start(0x1000, bits=16)
    with pytest.raises(ValueError, match="rip 0x100000000 is not a 32-bit address"):
        cpu.start(1 << 32, bits=32)


@pytest.mark.parametrize("vcpus", ["1", "3"])
def test_a_kernel_finds_the_board(
    vcpus: str, boot: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It reads how many CPUs there are, says so on the serial line, and ends by the exit port."""
    code = COUNT + b"\x04\x30" + out(0x3F8) + out(0x3F8, ord("!")) + out(0xF4, 7) + b"\xfa\xf4"  # add al, '0'
    (tmp_path / "kernel").write_bytes(image(code))
    assert boot(str(tmp_path / "kernel"), vcpus) == 7
    assert capsys.readouterr().out == f"{vcpus}!"


def test_a_kernel_without_an_end(boot: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(image(b"\xfa\xf4"))
    assert boot(str(tmp_path / "kernel"), "1") == 3


@needs_kernels
@pytest.mark.parametrize(
    ("name", "vcpus", "options", "passed"),
    [
        ("smptest", "2", {}, 1),
        ("smptest", "4", {"apicv": False}, 1),
        ("smptest", "3", {"vendor": "svm"}, 1),
        ("ioapic", "1", {}, 19),
        ("ioapic", "1", {"vendor": "svm", "apicv": False}, 19),
        ("ioapic", "2", {}, 29),
    ],
    ids=str,
)
def test_kvm_unit_tests(
    name: str, vcpus: str, options: dict, passed: int, boot: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """They pass, each of their checks."""
    assert boot(str(Path(KERNELS) / f"{name}.flat"), vcpus, **options) == 0
    said = capsys.readouterr().out
    assert (said.count("PASS"), said.count("FAIL")) == (passed, 0), said
