"""Every door of machines called with anything at all, their memory between pages that nobody may touch.

``python tests/hostile.py SEED CALLS`` plays one machine after the other, seeds SEED, SEED + 1 ..., until CALLS calls
are made. It prints each machine's seed before it begins, so the last line names the one that crashed or hung; and
``python tests/hostile.py THAT_SEED 1`` plays it alone. Doors are found, not listed: every @entry, every public method
and property of Machine and Vcpu; whoever adds one adds it to this storm.

A wall stands before and behind a machine's memory, and in every other machine behind the rows of its vCPUs as well, so
that a row of a vCPU that does not exist cannot be read. In the others such rows must still be zero at the end. The
guest's memory, a few pages that are replaced now and then, stands between walls as well.
"""

from __future__ import annotations

import ctypes
import faulthandler
import inspect
import mmap
import random
import re
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import fastexit as fx
from fastexit import hyperv as hv
from fastexit import layout as L
from fastexit import machine as machine_module
from fastexit import regs as r
from fastexit.exits.exit import Exit
from fastexit.jit import declare
from fastexit.kernels import entries as entries
from fastexit.profile import since
from generations import offered

PAGE = mmap.PAGESIZE
PROT_NONE = 0
ROWS = 64
"""vCPUs that a walled machine has room for: their rows end at a page's end in every region."""
REGIONS = (
    (L.HOT, L.HOT_STRIDE),
    (L.VEC, L.VEC_STRIDE),
    (L.PAGE, L.PAGE_STRIDE),
    (L.KVM, L.KVM_STRIDE),
    (L.TARGETS, L.TARGETS_STRIDE),
    (L.HV, L.HV_STRIDE),
    (L.XMM, L.XMM_STRIDE),
)
GROWING = {"add_vcpu", "create_vcpu"}
"""Doors that a walled machine has no room for."""
ARRAYS = {"exits": L.EXIT, "outcomes": L.OUTCOME}
"""Parameters of entries that are addresses, and of what."""
RECORDS = 48
CALLS_OF_ONE = 1500
SECONDS_OF_ONE = 100
"""After that a machine hangs: its process says where, and ends."""
ALLOWED = (ValueError, TypeError, fx.GeneralProtection, fx.InvalidOpcode)
HEAD = struct.Struct("<8sIIII")
NONE, U32, U48 = L.NONE, 0xFFFF_FFFF, (1 << 48) - 1
NO_NUMBERS = (None, "x", 1.5, b"", bytes(1024), [], [(0, 1)], {}, object())

HEADER = [value for name, value in vars(L).items() if name.startswith("H_") and value != L.H_STAGE]

_libc = ctypes.CDLL(None, use_errno=True)


def forbid(address: int, length: int) -> None:
    """Whoever touches these pages dies."""
    if _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(length), PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded(length: int) -> tuple[memoryview, int]:
    """Memory whose end is a page's end, with a forbidden page on either side; and its address."""
    pages = -(-length // PAGE) * PAGE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    block = mmap.mmap(-1, pages + 2 * PAGE, flags=flags)
    first = np.frombuffer(block, dtype=np.uint8).ctypes.data
    forbid(first, PAGE)
    forbid(first + PAGE + pages, PAGE)
    begin = PAGE + pages - length
    return memoryview(block)[begin : begin + length], first + begin


def allocate(walled: bool) -> memoryview:
    """What Machine takes for its memory."""
    block, address = guarded(L.BYTES)
    if walled:
        for first, stride in REGIONS:
            begin, end = first + ROWS * stride, first + L.MAX_VCPUS * stride
            forbid(address + 8 * begin, 8 * (end - begin))
    return block


def guests_memory(rng: random.Random) -> memoryview:
    """Some pages, or a little more, that end at a wall; noise, as guests leave it, and zeroes."""
    block, _ = guarded(rng.choice((1, 1, 2, 3, 16)) * PAGE + rng.choice((0, 0, 8, 4095)))
    if rng.random() < 0.5:
        block[: len(block) // 2] = rng.randbytes(len(block) // 2)
    return block


# ----------------------------------------------------------------------------------------------------- hostile numbers

EDGES = sorted(
    {0, 1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 31, 32, 49, 52, 63, 64, 65, 127, 128, 255, 256, 257, 511, 512, 513, 1023, 1024}
    | {0xFFF, 0x1000, 0x1001, 0xFFFF, 0x10000, 1 << 17, L.WORDS, L.BYTES, L.KVM, L.HOT, L.TRACE}
    | {r.MSR_APICBASE, r.MSR_TSC_DEADLINE, r.MSR_KVM_PV_EOI_EN, r.APIC_DEFAULT_PHYS_BASE, 0xFEE0_0300, 0xC000_0080}
)
MSRS = (r.MSR_APICBASE, r.MSR_TSC_DEADLINE, r.MSR_KVM_PV_EOI_EN, r.MSR_X2APIC_ICR, r.MSR_X2APIC_SELF_IPI, 0x80B, 0x808)
OF_HYPERV = (0x00, 0x01, 0x02, 0x03, 0x10, 0x20, 0x21, 0x70, 0x71, 0x72, 0x73, 0x73, 0x80, 0x81, 0x82, 0x83, 0x83, 0x84)
"""Hyper-V's MSRs, less their first number; SINTs and synthetic timers come in besides."""


def wild(rng: random.Random) -> int:
    """Any u64, mostly a strange one."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.getrandbits(64)
    if kind == 1:
        return rng.choice(EDGES)
    if kind == 2:
        return 1 << rng.randrange(64)
    if kind == 3:
        return (1 << rng.randrange(65)) - 1
    if kind == 4:
        return NONE - rng.randrange(600)
    return rng.getrandbits(rng.randrange(1, 64))


def icr(rng: random.Random) -> int:
    """An ICR that mostly means something."""
    return rng.choice((rng.randrange(80), rng.getrandbits(32), 0xFF, 0xFFFF_FFFF)) << 32 | rng.getrandbits(20)


def hyperv_msr(rng: random.Random) -> int:
    return hv.MSR_HV_FIRST + rng.choice((*OF_HYPERV, 0x90 + rng.randrange(16), *(0xB0 + rng.randrange(8),) * 4))


def hyperv_value(rng: random.Random) -> int:
    """A page that is enabled, a SINT, a timer's configuration or count."""
    page = rng.choice((0, 0x1000, 0x3000, 0x10000, 0x11000, 1 << 47, NONE & ~0xFFF)) | rng.choice((1, 1, 0, 0x801))
    sint = rng.randrange(256) | rng.choice((0, hv.HV_SINT_MASKED, hv.HV_SINT_AUTO_EOI, 7 << 16))
    timer = rng.randrange(16) | rng.choice((0, hv.HV_STIMER_DIRECT)) | rng.randrange(256) << 4 | rng.randrange(16) << 16
    return rng.choice((page, page, sint, timer, timer, 0, 1, rng.getrandbits(12), NONE, 1 << 63))


def hypercall_control(rng: random.Random) -> int:
    """A call that KVM knows, mostly, with counts that may be right."""
    code = int(rng.choice((*hv.HvCall, hv.HvCall.SEND_IPI, hv.HvCall.SEND_IPI_EX, hv.HvCall.SEND_IPI_EX)))
    control = code | rng.choice((0, hv.HV_CALL_FAST))
    if code > hv.HvCall.SEND_IPI or rng.random() < 0.1:
        control |= rng.choice((0, 1, 2, 3, 11, 12, 63, 64, 65, 1023)) << hv.HV_CALL_VAR_COUNT_SHIFT
    if rng.random() < 0.2:
        control |= rng.choice((1, 15, 16, 4095)) << hv.HV_CALL_REP_COUNT_SHIFT
    return control | (rng.getrandbits(64) & rng.getrandbits(64) & rng.getrandbits(64) if rng.random() < 0.1 else 0)


def hypercall_input(rng: random.Random) -> int:
    """A vector, or an address in the guest's memory, at its end, or beyond."""
    end = rng.choice((0, 0x1000, 0x2000, 0x3000, 0x10000))
    return rng.choice(
        (rng.randrange(300), rng.randrange(0x10000), end - rng.randrange(48) & NONE, NONE - rng.randrange(48))
    )


def likely(rng: random.Random, name: str, vcpus: int) -> int:
    """What a caller means by a parameter of this name, now and then past its end."""
    if name == "control" or (name == "rcx" and rng.random() < 0.7):
        return hypercall_control(rng)
    if name in ("given", "input", "rdx"):
        return hypercall_input(rng)
    if name in ("output", "r8"):
        return rng.choice((0, 1, rng.getrandbits(8), rng.getrandbits(64), hypercall_input(rng)))
    if name in ("sint", "level", "gsi", "version", "vp_index"):
        return rng.randrange(18)
    if name in ("v", "vcpu", "index"):
        return rng.randrange(vcpus + 1) if rng.random() < 0.1 else rng.randrange(vcpus)
    if name in ("cpu", "vcpu_id", "target", "dest", "first", "n"):
        return rng.randrange(2 * vcpus + 1)
    if "msr" in name or name in ("rcx", "ecx"):
        if rng.random() < 0.4:
            return hyperv_msr(rng)
        return rng.choice(MSRS) if rng.random() < 0.5 else 0x800 + rng.randrange(0x100)
    if "offset" in name:
        return rng.randrange(0x40) * 16
    if name in ("length", "size"):
        return rng.choice((1, 2, 4))
    if name == "sender":
        return L.HOST + rng.randrange(-1, L.HOSTS + 1)
    if "reason" in name:
        return int(rng.choice((*fx.VmxExit, *fx.SvmExit)))
    if name in ("address", "gpa"):
        return r.APIC_DEFAULT_PHYS_BASE | rng.getrandbits(20)
    if "vector" in name:
        return rng.randrange(256)
    if name == "value" and rng.random() < 0.4:
        return hyperv_value(rng)
    return icr(rng) if rng.random() < 0.5 else rng.randrange(64)


def number(rng: random.Random, name: str, vcpus: int) -> int:
    return likely(rng, name, vcpus) if rng.random() < 0.65 else wild(rng)


def page(rng: random.Random, old: bytes) -> bytes:
    """1 KiB for KVM_SET_LAPIC: noise, or the old page with noise in some registers."""
    if rng.random() < 0.3:
        return rng.randbytes(r.LAPIC_PAGE_BYTES)
    new = bytearray(old)
    for _ in range(rng.randrange(8)):
        struct.pack_into("<I", new, 4 * rng.randrange(256), rng.getrandbits(32))
    return bytes(new)


def entry(rng: random.Random, kind: str, gsi: int, vcpus: int) -> tuple[Any, ...]:
    """One entry of a GSI routing table."""
    if kind == "ioapic":
        return kind, gsi, rng.randrange(26)
    if kind == "pic":
        return kind, gsi, rng.randrange(2), rng.randrange(9)
    return kind, gsi, number(rng, "gsi", vcpus) & U32, rng.randrange(17)


def thing(rng: random.Random, name: str, vcpus: int) -> Any:
    """A Python argument: mostly a number, else what somebody may pass by mistake."""
    if rng.random() < 0.9:
        if name == "xmm":
            return [number(rng, "output", vcpus) for _ in range(rng.choice((0, 1, 2, 11, 12, 12, 13)))]
        if name == "entries":
            kinds = ("hv_sint", "msi") * 4 + ("ioapic", "ioapic", "pic", "x")
            return [entry(rng, rng.choice(kinds), gsi, vcpus) for gsi in range(4)]
        return number(rng, name, vcpus)
    return rng.choice(
        (
            -1,
            -(1 << 63),
            1 << 64,
            None,
            "x",
            1.5,
            True,
            False,
            b"",
            bytes(1024),
            [],
            [(0, 1)],
            {},
            np.uint64(5),
            object(),
        )
    )


# --------------------------------------------------------------------------------------------------------------- doors


def entry_parameters() -> dict[str, list[str]]:
    """Names of the parameters of each entry of the library, the handle left out.

    An entry that only checks a vCPU's index around a kernel has that kernel's names.
    """
    found = {}
    for name, declared in declare.ENTRIES.items():
        if declared.python.__module__.startswith("fastexit.kernels."):  # others are no machine's
            handle, *others = inspect.signature(declared.python).parameters
            assert handle == "handle", f"entry {name} does not begin with the machine's handle"
            inner = inspect.getclosurevars(declared.python).nonlocals.get("inner")
            if inner is not None:
                others = list(inspect.signature(getattr(inner, "py_func", inner)).parameters)[1:]
            found[name] = others
    return found


def unknown_addresses() -> list[str]:
    """Entries that open an address which this storm takes for a number."""
    found = []
    for name in entry_parameters():
        opened = re.findall(r"open_words\((\w+),", inspect.getsource(declare.ENTRIES[name].python))
        found += [f"{name}({argument})" for argument in opened if argument not in ("handle", *ARRAYS)]
    return found


def methods(cls: type) -> dict[str, list[str]]:
    """Public methods of a class and their parameters; ** stands for exit information."""
    found = {}
    for name in dir(cls):
        attribute = inspect.getattr_static(cls, name)
        if not name.startswith("_") and inspect.isfunction(attribute):
            parameters = list(inspect.signature(attribute).parameters.values())[1:]
            found[name] = ["**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters]
    return found


def settable(cls: type) -> list[str]:
    """Names of the properties that can be assigned."""
    return [name for name in dir(cls) if getattr(inspect.getattr_static(cls, name), "fset", None)]


def readable(cls: type) -> list[str]:
    return [name for name in dir(cls) if isinstance(inspect.getattr_static(cls, name), property)]


class Storm:
    """One machine and its life; ``calls`` counts what was called, ``accepted`` how often without an exception."""

    def __init__(self, seed: int, loud: bool = False) -> None:
        self.loud = loud
        self.rng = rng = random.Random(seed)
        self.walled = rng.random() < 0.5
        machine_module.reserve = lambda size: allocate(self.walled) if size == L.BYTES else guests_memory(rng)
        self.entries = entry_parameters()
        self.methods = {cls: methods(cls) for cls in (fx.Machine, fx.Vcpu)}
        self.settable = {cls: settable(cls) for cls in (fx.Machine, fx.Vcpu)}
        self.readable = {cls: readable(cls) for cls in (fx.Machine, fx.Vcpu)}
        if self.walled:
            for doors in (self.entries, self.methods[fx.Machine]):
                for name in GROWING & doors.keys():
                    del doors[name]
        self.calls = self.accepted = 0
        self.refusals: set[str] = set()
        self.m = self.root = self._machine()
        self.buffers = {name: guarded(RECORDS * dtype.itemsize) for name, dtype in ARRAYS.items()}

    # ---------------------------------------------------------------------------------------------------- machines

    def _machine(self) -> fx.Machine:
        rng = self.rng
        vendor = rng.choice(("vmx", "svm"))
        svm = vendor == "svm"
        count = ROWS if self.walled else rng.choice((1, 2, 3, 5, 8, 17))
        kernel, apicv = rng.choice(fx.profiles()), rng.random() < 0.6
        beyond = r.AVIC_MAX_ID if svm and apicv and not since(kernel, "6.18") else L.MAX_VCPU_ID
        ids = rng.sample(range(beyond + 1), count) if rng.random() < 0.5 else list(range(count))
        options: dict[str, Any] = {
            "kernel": kernel,
            "apicv": apicv,
            "irqchip": rng.choice(("full", "split")),
            "x2apic_api": rng.randrange(4),
            "threads": rng.random() < 0.5,
            "hv_timer": None if svm else rng.choice((None, True, False)),
            "disable_exits": rng.randrange(16),
            "disable_quirks": rng.randrange(8),
            "boot_cpu_id": rng.choice((0, ids[-1])),
            "tsc_khz": rng.choice((1, 1_000_000, 3_000_001, 10_000_000)),
            "bus_cycle_ns": rng.choice((1, 40, 1_000_000)),
            "min_timer_period_us": rng.choice((0, 200)),
            "timer_advance_ns": rng.choice((0, 1000)),
        }
        for switch in "x2apic tsc_deadline vector_hashing cmci smm nrips pi_inject_timer retpoline".split():
            options[switch] = rng.random() < 0.7
        if options["apicv"]:
            options |= {"ipiv": rng.random() < 0.5, ("x2avic" if svm else "vtd_pi"): rng.random() < 0.5}
        options |= {"apic_ids": ids, "vendor": vendor, "boot_cpu_id": options["boot_cpu_id"]}
        options["hyperv"] = rng.choice((False, True, True, "enforce"))
        if rng.random() < 0.5:
            options["hyperv_features"] = rng.getrandbits(len(hv.HvFeature))
        m = fx.Machine(**offered(options["kernel"], options))
        if options["x2apic"] and rng.random() < 0.7:
            m.boot_x2apic()
        if options["hyperv"]:
            for v in m.vcpus:
                v.set_msr(hv.MSR_HV_GUEST_OS_ID, 1)
                if rng.random() < 0.7:
                    v.enable_synic(rng.choice((1, 2)))
        if rng.random() < 0.6:
            m.trace.enable()
            if rng.random() < 0.5:
                m.mem[L.H_TRACE_HEAD] = L.TRACE_CAPACITY - rng.randrange(200)
        return m

    def restore(self) -> None:
        """A snapshot with forged words under a good checksum; what the library takes, the storm goes on with."""
        rng = self.rng
        data = rng.choice((self.root, self.m)).snapshot()
        magic, abi, n, _, length = HEAD.unpack_from(data)
        words = np.frombuffer(data, dtype=np.uint64, offset=HEAD.size).copy()
        for _ in range(rng.choice((1, 1, 1, 1, 2, 4))):
            at = self.interesting_word(n, len(words))
            words[at] = wild(rng) if rng.random() < 0.6 else int(words[at]) ^ 1 << rng.randrange(64)
        body = words.tobytes()
        self.m = fx.Machine.restore(HEAD.pack(magic, abi, n, zlib.crc32(body), length) + body)
        self.probe()
        if rng.random() < 0.5:
            self.m.trace.enable()

    def probe(self) -> None:
        """What reads most of a machine's words, before something overwrites them."""
        rng, m = self.rng, self.m
        deliver = (
            lambda v: v.eoi(),
            lambda v: (v.pending(), v.ack(), v.eoi()),
            lambda v: v.set_msr(r.MSR_X2APIC_ICR, icr(rng)),
            lambda v: v.wrmsr(r.MSR_X2APIC_ICR, icr(rng)),
            lambda v: v.mmio_write(r.APIC_ICR, rng.getrandbits(20)),
            lambda v: m.signal_msi(likely(rng, "address", 1), rng.getrandbits(16)),
            lambda v: v.run(),
            lambda v: v.hv_hypercall(hypercall_control(rng), hypercall_input(rng), rng.getrandbits(64)),
            lambda v: v.set_msr(hyperv_msr(rng), hyperv_value(rng)),
        )
        for _ in range(6):
            self.note("probe")
            rng.choice(deliver)(rng.choice(m.vcpus))

    def interesting_word(self, n: int, length: int) -> int:
        """Index of a word in a snapshot of n vCPUs, mostly of one that matters."""
        rng = self.rng
        tables = L.MAP1 + L.MAP_WORDS
        hot = tables + L.TABLES_END - L.FILTER
        windows = length - n * L.HV_STRIDE
        kvm = windows - n * L.KVM_STRIDE
        vcpu = rng.randrange(n)
        base = rng.choice((L.MAP0, L.MAP1))
        return rng.choice(
            (
                rng.choice(HEADER),
                rng.choice(HEADER),
                base + rng.choice((0, 1, 2, rng.randrange(L.MAP_WORDS))),
                base + L.MAP_SLOTS + rng.randrange(64),
                rng.randrange(tables, hot),
                tables + rng.randrange(4) * L.FILTER_STRIDE + rng.randrange(4),
                hot + vcpu * L.HOT_STRIDE + rng.randrange(L.HOT_STRIDE),
                kvm + vcpu * L.KVM_STRIDE + rng.randrange(L.KVM_STRIDE),
                kvm + vcpu * L.KVM_STRIDE + rng.randrange(L.KVM_STRIDE),
                windows + vcpu * L.HV_STRIDE + rng.randrange(L.HV_STRIDE),
                windows + vcpu * L.HV_STRIDE + rng.randrange(L.HV_STRIDE),
                rng.randrange(length),
            )
        )

    def check_empty_rows(self) -> None:
        """Nobody wrote to a row of a vCPU that does not exist."""
        if self.walled:
            return
        words, n = self.m.words, self.m.mem[L.H_NVCPUS]
        for first, stride in REGIONS:
            assert not words[first + n * stride : first + L.MAX_VCPUS * stride].any(), "a row of nobody was written to"

    # ------------------------------------------------------------------------------------------------------- calls

    def records(self, name: str, n: int, hostile: bool = True) -> np.ndarray:
        """An array of a batch that ends at a wall; exits are filled with records that are at home in it, and others."""
        rng, (block, _) = self.rng, self.buffers[name]
        dtype = ARRAYS[name]
        array = np.frombuffer(block, dtype=dtype)[RECORDS - n :]
        if name == "exits":
            vendor, vcpus = self.m.dispatcher.vendor, len(self.m.vcpus)
            usual = (vendor.wrmsr_reason, vendor.rdmsr_reason, vendor.mmio_reason, vendor.io_reason)
            usual += (vendor.hypercall_reason,)
            for i in range(n):
                reason = rng.choice(usual) if rng.random() < 0.6 else number(rng, "reason", vcpus)
                info = rng.choice((1, 2, 4, 8)) | rng.choice((0, fx.MMIO_WRITE))
                index = rng.randrange(vcpus)
                msr = likely(rng, "msr", vcpus)
                gpa = number(rng, "gpa", vcpus) & U48
                if reason == vendor.io_reason:
                    info = self.m.io_info(rng.getrandbits(16), rng.choice((1, 2, 4)), rng.random() < 0.5)
                value = icr(rng)
                if reason == vendor.hypercall_reason:
                    control, value, gpa = hypercall_control(rng), hypercall_input(rng), rng.getrandbits(64)
                    msr, info = control & U32, control >> 32
                elif hv.MSR_HV_FIRST <= msr <= hv.MSR_HV_LAST:
                    value = hyperv_value(rng)
                if hostile and rng.random() < 0.1:
                    msr, info, gpa = wild(rng), wild(rng), wild(rng)
                if hostile and rng.random() < 0.05:
                    index = rng.choice((vcpus, wild(rng)))
                array[i] = (index & U32, reason & U32, msr & U32, info & U32, value, gpa)
        return array

    def note(self, *what: object) -> None:
        if self.loud:
            print(*what, flush=True)

    def entry(self) -> None:
        """A compiled entry, with numbers as they come."""
        rng, m = self.rng, self.m
        name = rng.choice(list(self.entries))
        parameters, vcpus = self.entries[name], m.mem[L.H_NVCPUS]
        opened, arguments = [], []
        n = rng.randrange(RECORDS + 1)
        for parameter in parameters:
            if parameter in ARRAYS:
                array = self.records(parameter, n)
                opened.append(array.ctypes.data)
                if not declare.JIT:
                    declare.register(opened[-1], array.view(np.uint64))
                arguments.append(opened[-1])
            elif opened and parameter == "n":
                arguments.append(n)
            else:
                arguments.append(number(rng, parameter, vcpus))
        self.note(name, *arguments)
        # One entry finds the vCPU's index in the handle itself.
        packed = (
            rng.choice((0, 1, max(vcpus, 1) - 1, min(vcpus, L.MAX_VCPUS - 1), L.MAX_VCPUS - 1))
            if name == "fast_exit"
            else 0
        )
        result = declare.load(name)(m.handle + packed, *arguments)
        assert result is None or 0 <= result <= NONE
        for address in opened:
            if not declare.JIT:
                declare.unregister(address)
        if vcpus != m.mem[L.H_NVCPUS]:  # the Python side learns of vCPUs that an entry made
            for index in range(vcpus, m.mem[L.H_NVCPUS]):
                vcpu_id = m.mem[L.KVM + index * L.KVM_STRIDE + L.K_VCPU_ID]
                m._ids.setdefault(vcpu_id, index)
                m.vcpus.append(fx.Vcpu(m, index, vcpu_id))

    def method(self) -> None:
        """A public method, or an assignment, or all that can be read."""
        rng, m = self.rng, self.m
        target = m if rng.random() < 0.2 else rng.choice(m.vcpus)
        cls, vcpus = type(target), len(m.vcpus)
        if rng.random() < 0.1:
            for name in self.readable[cls]:
                getattr(target, name)
            return
        if rng.random() < 0.1 and self.settable[cls]:
            name, value = rng.choice(self.settable[cls]), thing(rng, "value", vcpus)
            if name == "guest_memory" and rng.random() < 0.8:
                value = guests_memory(rng)
            setattr(target, name, value)
            return
        name, parameters = rng.choice(list(self.methods[cls].items()))
        if name == "run" and target is m:
            self.note("a batch")
            m.run(self.records("exits", rng.randrange(RECORDS + 1), hostile=rng.random() < 0.1))
            return
        arguments: dict[str, Any] = {}
        for parameter in parameters:
            if parameter == "**":
                fields = [*Exit.__dataclass_fields__, "rax", "rcx", "rdx"]
                chosen = rng.sample(fields[1:], rng.randrange(4))
                arguments |= {field: thing(rng, field, vcpus) for field in chosen}
            elif name == "set_lapic" and rng.random() < 0.8:
                arguments[parameter] = page(rng, target.get_lapic())
            else:
                arguments[parameter] = thing(rng, parameter, vcpus)
        self.note(target, name, arguments)
        getattr(target, name)(**arguments)

    def descriptor(self) -> None:
        """What a device or a simulator may write at any time."""
        pid = self.rng.choice(self.m.vcpus).pid
        pid[self.rng.randrange(5)] = wild(self.rng)

    def trace(self) -> None:
        """The trace's doors."""
        trace = self.m.trace
        if len(trace) < 3000:
            assert len(trace.lines()) <= len(trace)
            trace.text()
        if self.rng.random() < 0.3:
            self.rng.choice((trace.clear, trace.enable, trace.disable))()

    def play(self, calls: int = CALLS_OF_ONE) -> None:
        """Calls doors; whatever they refuse is refused in one line, by an exception that says so."""
        doors: list[tuple[float, Callable[[], None]]] = [
            (0.62, self.entry),
            (0.93, self.method),
            (0.96, self.descriptor),
            (0.99, self.restore),
            (1.0, self.trace),
        ]
        for _ in range(calls):
            dice = self.rng.random()
            door = next(door for limit, door in doors if dice < limit)
            self.calls += 1
            try:
                door()
            except ALLOWED as refusal:
                self.refusals.add(str(refusal))
            else:
                self.accepted += 1
        assert not [text for text in self.refusals if "\n" in text]
        self.check_empty_rows()


def storms(seed: int, calls: int, loud: bool = False) -> Iterator[Storm]:
    """Machines that have lived, until there were so many calls."""
    while calls > 0:
        print(f"seed {seed}", flush=True)
        faulthandler.dump_traceback_later(SECONDS_OF_ONE, exit=True)
        storm = Storm(seed, loud)
        storm.play()
        yield storm
        calls -= storm.calls
        seed += 1


def main() -> int:
    """What a subprocess does, so that a crash is its alone."""
    faulthandler.enable()
    # Compiling comes first, so that a machine's time is its own.
    declare.warmup()
    if not declare.JIT:
        warnings.filterwarnings("ignore", "overflow encountered in scalar", RuntimeWarning)
    seed, calls = int(sys.argv[1]), int(sys.argv[2])
    total = accepted = 0
    for storm in storms(seed, calls, loud="loud" in sys.argv):
        total += storm.calls
        accepted += storm.accepted
    print(f"{total} calls, {accepted} accepted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
