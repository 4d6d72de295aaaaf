"""Guest code on Unicorn's CPUs: what reaches the guest's IDT is what the machine says, one for one."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("unicorn", reason="unicorn is not installed")

import fastexit as fx
import unicorn_guest as G
from fastexit.adapters.unicorn import Ended, GuestError, Stop, UnicornHost, idt
from fastexit.outcome import Path as Taken
from unicorn_guest import HLT, NOP, SPIN, STI, STOP, at, bump, count, guest, put, read, returned, wrmsr

IPI = 0x40
LONG = 1_000_000
"""No program here takes so many instructions."""
SELF = wrmsr(G.SELF_IPI, IPI)
APICV_OFF, SVM = {"apicv": False}, {"vendor": "svm"}
MACHINES = ({}, APICV_OFF, SVM, SVM | APICV_OFF, {"ipiv": True}, {"kernel": "5.6"})


def example() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "unicorn_ipi.py"
    spec = importlib.util.spec_from_file_location("unicorn_ipi", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------------------- IPIs


@pytest.mark.parametrize("machine", MACHINES, ids=str)
@pytest.mark.parametrize("xapic", [False, True], ids=["x2apic", "xapic"])
def test_every_ipi_arrives_once(xapic: bool, machine: dict[str, object]) -> None:
    result = example().play(3, 5, xapic=xapic, **machine)
    assert result["wrong"] == []
    assert result["lost"] == 0
    fast = sum(row["fast"] for row in result["rows"])
    assert fast == (0 if xapic or machine.get("ipiv") else 15)


def test_example_finds_what_is_lost(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    module = example()
    assert module.main(["--cpus", "2", "--rounds", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["lost"] == 0
    monkeypatch.setattr("fastexit.adapters.unicorn.gate.take", None)
    monkeypatch.setattr("fastexit.adapters.unicorn.interrupts.take", lambda cpu, event, vector, error=None: None)
    assert module.main(["--cpus", "2", "--rounds", "3", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["lost"] > 0
    assert module.main(["--cpus", "1"]) == 2


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_self_ipi_by_msr(machine: dict[str, object]) -> None:
    host = guest(STI + SELF + STOP, **machine)
    assert host.run(instructions=LONG) is Ended.IDLE
    assert count(host, IPI) == 1
    assert returned(host, IPI) == at(STI, SELF)
    assert host.cpus[0].vcpu.pending() is None


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_interrupts_off_delay_it_and_sti_shadows_one_instruction(machine: dict[str, object]) -> None:
    before, shadowed = SELF + put(0x500, 1) + STI, put(0x504, 1)
    host = guest(before + shadowed + put(0x508, 1) + STOP, **machine)
    assert host.run(instructions=LONG) is Ended.IDLE
    assert count(host, IPI) == 1
    assert returned(host, IPI) == at(before, shadowed)
    assert host.cpus[0].instructions < 60


def test_popf_opens_at_once() -> None:
    popf = b"\x68\x02\x02\x00\x00\x9d"  # push 0x202; popfq
    host = guest(SELF + popf + NOP + STOP)
    host.run(instructions=LONG)
    assert returned(host, IPI) == at(SELF, popf)


def test_mov_ss_shadows_one_instruction() -> None:
    """A slice that ends behind MOV SS delivers one instruction later."""
    mov_ss = b"\xb8\x10\x00\x00\x00\x8e\xd0"  # mov eax, 0x10; mov ss, eax
    host = guest(STI + mov_ss + NOP + SPIN, quantum=1)
    host.run(instructions=4)
    assert host.cpus[0]["rip"] == at(STI, mov_ss)
    host.machine.signal_msi(0xFEE0_0000, IPI)
    host.run(instructions=1)
    assert count(host, IPI) == 0
    host.run(instructions=30)
    assert count(host, IPI) == 1
    assert returned(host, IPI) == at(STI, mov_ss, NOP)


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_interrupt_gate_clears_if_trap_gate_does_not(machine: dict[str, object]) -> None:
    """A second interrupt of a higher class nests in a trap gate's handler, and waits for IRET of the other."""
    for traps, order in (((), [IPI, 0x60]), ((IPI,), [0x60, IPI])):
        host = guest(STI + SELF + STOP, vectors=(IPI, 0x60), traps=traps, **machine)
        log = b"\x8b\x04\x25" + G.word(0x500) + b"\xc6\x80" + G.word(0x508)  # mov eax, [0x500]; mov byte [rax + 0x508]
        for vector in (IPI, 0x60):
            again = wrmsr(G.SELF_IPI, 0x60) + NOP if vector == IPI else b""
            end = log + bytes((vector,)) + bump(0x500) + wrmsr(G.X2APIC_EOI, 0) + G.IRETQ
            host.load(0xF000 + 0x100 * (vector == IPI), again + end)
        gates = {IPI: 0xF100, 0x60: 0xF000}
        host.load(G.IDT, idt(gates, traps=traps))
        assert host.run(instructions=LONG) is Ended.IDLE
        assert list(host.memory[0x508:0x50A]) == order


@pytest.mark.parametrize("machine", MACHINES, ids=str)
@pytest.mark.parametrize("cr8", [False, True], ids=["TPR", "CR8"])
def test_priority(cr8: bool, machine: dict[str, object]) -> None:
    def tpr(value: int) -> bytes:
        if cr8:
            return b"\xb8" + G.word(value >> 4) + b"\x44\x0f\x22\xc0"  # mov eax; mov cr8, rax
        return wrmsr(G.X2APIC_TPR, value)

    masked = STI + tpr(0x50) + SELF + put(0x500, 1)
    read_back = b"\x44\x0f\x20\xc3\x89\x1c\x25" + G.word(0x504)  # mov rbx, cr8; mov [0x504], ebx
    host = guest(masked + read_back + tpr(0x30) + NOP + STOP, **machine)
    assert host.run(instructions=LONG) is Ended.IDLE
    assert read(host, 0x504, 4) == 5
    assert count(host, IPI) == 1
    assert returned(host, IPI) == at(masked, read_back, tpr(0x30))


def test_halted_cpu_wakes() -> None:
    first = wrmsr(G.X2APIC_ICR, 1 << 32 | IPI) + STOP
    host = guest(b"\x90" * 300 + first, STI + HLT + put(0x500, 7) + STOP, quantum=50)
    assert host.run(instructions=LONG) is Ended.IDLE
    assert count(host, IPI) == 1
    assert read(host, 0x500, 4) == 7
    assert returned(host, IPI) == at(STI, HLT, cpu=1)
    assert host.cpus[1].counters.stops[Stop.HLT] == 2
    assert [cpu.state for cpu in host.cpus] == ["halted", "halted"]


# ------------------------------------------------------------------------------------------- registers and faults


def test_rdmsr() -> None:
    reads = [G.rdmsr(msr, 0x500 + 8 * i) for i, msr in enumerate((0x1B, 0x802, 0x803, 0x80F, 0x830))]
    icr = wrmsr(G.X2APIC_ICR, 0x1234_5678 << 32 | 0x4041)
    foreign = wrmsr(0xC000_0100, 0x5555_0000_1111) + G.rdmsr(0xC000_0100, 0x528)  # FS.base is Unicorn's
    host = guest(b"", icr + b"".join(reads) + foreign + STOP)
    host.run(instructions=LONG)
    v = host.cpus[1].vcpu
    got = struct.unpack_from("<6Q", host.memory, 0x500)
    assert got == (v.apic_base, 1, v.get_msr(0x803), 0x1FF, 0x1234_5678_0000_4041, 0x5555_0000_1111)
    assert host.cpus[1].counters.ipis == 1


def test_reserved_bits_fault_through_the_guests_idt() -> None:
    bad = wrmsr(G.X2APIC_ICR, 1 << 20 | IPI)
    host = guest(bad + put(0x500, 1) + STOP, faults=(13,))
    assert host.run(instructions=LONG) is Ended.IDLE
    assert count(host, 13) == 1
    assert returned(host, 13) == at(bad) - 2
    assert read(host, 0x500, 4) == 1
    assert (host.cpus[0].counters.refused, host.cpus[0].counters.ipis) == (1, 0)


def test_rdmsr_of_a_write_only_register_faults() -> None:
    eoi = G.mov_ecx(G.X2APIC_EOI) + b"\x0f\x32"
    host = guest(eoi + STOP, faults=(13,))
    assert host.run(instructions=LONG) is Ended.IDLE
    assert returned(host, 13) == at(eoi) - 2


def test_int_n_and_undefined_instruction() -> None:
    host = guest(b"\xcd\x40\xcd\x0d\x0f\x0b" + STOP, vectors=(), faults=(6,))  # int 0x40; int 13; ud2
    host.load(0xF000, bump(0x500) + G.IRETQ)
    gate = idt({IPI: 0xF000})[16 * IPI : 16 * IPI + 16]
    for vector in (IPI, 13):  # an INT pushes no error code
        host.load(G.IDT + 16 * vector, gate)
    assert host.run(instructions=1000) is Ended.IDLE
    assert (read(host, 0x500, 4), count(host, 6)) == (2, 1)
    assert returned(host, 6) == at(b"\xcd\x40\xcd\x0d")


def test_cpuid_and_tsc() -> None:
    code = b"\xb8\x01\x00\x00\x00\x0f\xa2\x89\x1c\x25" + G.word(0x500) + b"\x89\x0c\x25" + G.word(0x504)
    tsc = b"\x0f\x31" + G.keep(0x508) + b"\x90" * 9 + b"\x0f\x31" + G.keep(0x510) + b"\x0f\x01\xf9" + G.keep(0x518)
    host = guest(b"", code + tsc + G.rdmsr(0x10, 0x520) + STOP, x2apic=True, tsc_deadline=False, tsc_khz=2_000_000)
    host.run(instructions=LONG)
    ebx, ecx = struct.unpack_from("<II", host.memory, 0x500)
    assert (ebx >> 24, ecx >> 21 & 1, ecx >> 24 & 1) == (1, 1, 0)
    first, second, third, fourth = struct.unpack_from("<4Q", host.memory, 0x508)
    assert [second - first, third - second, fourth - third] == [24, 6, 8]  # twice the instructions between


def test_tsc_is_the_guests_to_move() -> None:
    """IA32_TSC and IA32_TSC_ADJUST, within a slice of instructions."""
    code = wrmsr(0x10, 1000) + b"\x0f\x31" + G.keep(0x500) + G.rdmsr(0x3B, 0x508) + wrmsr(0x3B, 0)
    host = guest(b"", code + b"\x0f\x31" + G.keep(0x510) + STOP, x2apic=True, tsc_khz=2_000_000)
    host.run(instructions=LONG)
    written, moved, back = struct.unpack_from("<3Q", host.memory, 0x500)
    assert written == 1002  # one instruction behind the WRMSR, two ticks each
    assert 900 < moved < 1000
    assert 0 < back - (written - moved) < 200


# --------------------------------------------------------------------------------------------------- the xAPIC page


def test_page_moves_with_apicbase() -> None:
    moved = 0xFED0_0000
    base = wrmsr(0x1B, moved | 0x900)
    code = G.peek(G.XAPIC + 0x30, 0x500) + base + G.peek(moved + 0x30, 0x504) + G.peek(G.XAPIC + 0x30, 0x508)
    off = wrmsr(0x1B, moved | 0x100) + G.poke(moved + 0x80, 0x20) + G.peek(moved + 0x30, 0x50C)
    host = guest(code + off + STOP, xapic=True)
    assert host.run(instructions=LONG) is Ended.IDLE
    there, moved_there, left, disabled = struct.unpack_from("<4I", host.memory, 0x500)
    assert there == moved_there == 0x5_0014  # the version register
    assert (left, disabled) == (0xFFFF_FFFF, 0xFFFF_FFFF)


def test_memory_hides_the_page() -> None:
    base = wrmsr(0x1B, 0x10000 | 0x900)
    host = guest(base + G.poke(0x10080, 0x20) + STOP, xapic=True)
    host.run(instructions=LONG)
    assert read(host, 0x10080, 4) == 0x20
    assert host.cpus[0].counters.mmio == 0


# ------------------------------------------------------------------------------------------------------ INIT and SIPI

TRAMPOLINE = bytes.fromhex(
    "fa"  # cli
    "2e0f01164000"  # lgdt cs:[0x40]
    "0f20c0 0c01 0f22c0"  # mov eax, cr0; or al, 1; mov cr0, eax
    "66ea00810000 1800"  # jmp 0x18:0x8100
)
PROTECTED = bytes.fromhex(
    "b810000000 8ed8 8ec0 8ed0"  # mov eax, 0x10; mov ds, es, ss, eax
    "bc00b00000 0f011d20180000"  # mov esp, 0xb000; lidt [0x1820]
    "b90f080000 b8ff010000 31d2 0f30"  # SVR 0x1FF: INIT has switched the APIC off
    "fb f4 fa"  # sti; hlt; cli
    "0f20e0 83c820 0f22e0"  # CR4.PAE
    "b800c00000 0f22d8"  # cr3 = 0xc000
    "b9800000c0 0f32 0d00010000 0f30"  # EFER.LME
    "0f20c0 0d00000080 0f22c0"  # CR0.PG
    "ea00820000 0800"  # jmp 0x08:0x8200
)
DESCRIPTORS = (0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x00CF_9B00_0000_FFFF)


def test_init_and_sipi_bring_an_ap_from_real_to_long_mode() -> None:
    """The AP takes one IPI in protected mode and one in long mode."""
    init, sipi = wrmsr(G.X2APIC_ICR, 1 << 32 | 0x4500), wrmsr(G.X2APIC_ICR, 1 << 32 | 0x4608)
    wait = [b"\x83\x3c\x25" + G.word(flag) + bytes((1,)) + b"\x75\xf6" for flag in (0x500, 0x504)]  # cmp; jne
    ipi = wrmsr(G.X2APIC_ICR, 1 << 32 | IPI)
    long_mode = b"\x0f\x01\x1c\x25" + G.word(G.IDTR) + put(0x504, 1) + STI + HLT + put(0x508, 1) + STOP
    pause = b"\xb9\x40\x00\x00\x00\xff\xc9\x75\xfc"  # mov ecx, 64; dec ecx; jnz
    host = guest(init + sipi + pause * 3 + ipi + wait[1] + pause + ipi + STOP, b"", quantum=40)
    host.load(0x8000, TRAMPOLINE.ljust(0x40, b"\0") + struct.pack("<HI", 31, 0x8050))
    host.load(0x8050, struct.pack("<4Q", *DESCRIPTORS))
    host.load(0x8100, PROTECTED)
    host.load(0x8200, long_mode)
    host.load(0xC000, struct.pack("<Q", 0xD003))
    host.load(0xD000, struct.pack("<Q", 0x1_0003))
    host.load(0x1_0000, struct.pack("<Q", 0x83))
    gate32 = struct.pack("<HHBBH", 0x8300, 0x18, 0, 0x8E, 0)
    host.load(0x1_1000 + 8 * IPI, gate32)
    host.load(0x1820, struct.pack("<HI", 0x7FF, 0x1_1000))
    eoi32 = b"\xb9" + G.word(0x80B) + b"\x31\xc0\x31\xd2\x0f\x30"
    host.load(0x8300, b"\xff\x05" + G.word(0x510) + eoi32 + b"\xcf")  # inc dword [0x510]; EOI; iretd
    assert host.cpus[1].state == "waiting for SIPI"
    assert host.run(instructions=100_000) is Ended.IDLE
    assert (read(host, 0x510, 4), count(host, IPI), read(host, 0x508, 4)) == (1, 1, 1)
    assert host.cpus[1].counters.taken == {IPI: 2}


def test_real_mode_interrupt() -> None:
    """An AP that stays in real mode takes an IPI through the vector table at 0."""
    init, sipi = wrmsr(G.X2APIC_ICR, 1 << 32 | 0x4500), wrmsr(G.X2APIC_ICR, 1 << 32 | 0x4608)
    host = guest(init + sipi + b"\x90" * 200 + wrmsr(G.X2APIC_ICR, 1 << 32 | IPI) + STOP, b"", quantum=40)
    svr = bytes.fromhex("66b90f080000 66b8ff010000 6631d2 0f30")
    stack = bytes.fromhex("b80009 8ed0 bc0004")  # ss:sp = 900:400
    host.load(0x8000, svr + stack + bytes.fromhex("fb f4 8c0e0205 fa f4"))  # sti; hlt; mov [502], cs; cli; hlt
    host.load(0x8400, bytes.fromhex("2e c6060008 55 8c0e0005 cf"))  # mov byte cs:[800], 55; mov [500], cs; iret
    host.load(4 * IPI, struct.pack("<HH", 0x0400, 0x0800))
    assert host.run(instructions=10_000) is Ended.IDLE
    assert (read(host, 0x500, 2), read(host, 0x502, 2), read(host, 0x8800, 1)) == (0x800, 0x800, 0x55)
    assert host.cpus[1]["rsp"] == 0x400


def test_init_stops_a_cpu_that_runs() -> None:
    init = wrmsr(G.X2APIC_ICR, 1 << 32 | 0x4500)
    host = guest(b"\x90" * 100 + init + STOP, SPIN, quantum=20)
    assert host.run(instructions=1000) is Ended.IDLE
    assert host.cpus[1].state == "waiting for SIPI"


# ----------------------------------------------------------------------------------------------------- NMI and time


def test_nmi_waits_for_iret() -> None:
    """Two NMIs, the second while the first is handled: it comes behind IRET."""
    nmi = wrmsr(G.X2APIC_ICR, 0x4_0400)  # to itself
    host = guest(nmi + put(0x508, 1) + STOP, vectors=())
    body = bump(0x500) + b"\x83\x3c\x25" + G.word(0x500) + b"\x01" + b"\x75" + bytes((len(nmi) + 11,))
    host.load(0xF000, body + nmi + put(0x504, 1) + G.IRETQ)
    host.load(G.IDT, idt({2: 0xF000}))
    assert host.run(instructions=LONG) is Ended.IDLE
    assert (read(host, 0x500, 4), read(host, 0x504, 4), read(host, 0x508, 4)) == (2, 1, 1)


def test_deadline_timer_wakes_a_sleeper_at_its_time() -> None:
    timer = wrmsr(0x832, 0x4_0000 | IPI) + wrmsr(0x6E0, 50_000)
    host = guest(timer + STI + HLT + b"\x0f\x31" + G.keep(0x500) + STOP)
    assert host.run(instructions=LONG) is Ended.IDLE
    assert count(host, IPI) == 1
    assert 50_000 <= read(host, 0x500) < 50_040
    assert host.clock < 50_100


def test_periodic_timer_interrupts_what_runs() -> None:
    timer = wrmsr(0x83E, 0xB) + wrmsr(0x832, 0x2_0000 | IPI) + wrmsr(0x838, 400_000)
    host = guest(timer + STI + SPIN)
    assert host.run(lambda host: count(host, IPI) == 3, instructions=2_000_000) is Ended.UNTIL
    assert 1_200_000 <= host.machine.time < 1_202_000


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_count_runs_down_from_the_whole(machine: dict[str, object]) -> None:
    """A guest that measures its timer by a loop reads the whole count, and less after some rounds; never 0, "over"."""
    arm = wrmsr(0x83E, 0xB) + wrmsr(0x832, 0x1_0000) + wrmsr(0x838, 0xFFFF_FFFF)
    spin = b"\xb9" + G.word(300) + b"\xff\xc9\x75\xfc"  # mov ecx, 300; dec ecx; jnz
    host = guest(arm + G.rdmsr(0x839, 0x500) + spin + G.rdmsr(0x839, 0x508) + STOP, quantum=100, **machine)
    assert host.run(lambda host: host.cpus[0].asleep, instructions=LONG) is Ended.UNTIL
    assert read(host, 0x500) == 0xFFFF_FFFF
    assert 500 <= 0xFFFF_FFFF - read(host, 0x508) <= 700


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_count_is_whole_in_the_handler_of_a_tick(machine: dict[str, object]) -> None:
    timer = wrmsr(0x83E, 0xB) + wrmsr(0x832, 0x2_0000 | IPI) + wrmsr(0x838, 400_000)
    host = guest(timer + STI + SPIN, **machine)
    host.load(0xF000, G.rdmsr(0x839, 0x500) + wrmsr(G.X2APIC_EOI, 0) + STOP)
    host.load(G.IDT, idt({IPI: 0xF000}))
    assert host.run(lambda host: read(host, 0x500), instructions=LONG) is Ended.UNTIL
    assert 399_000 < read(host, 0x500) <= 400_000


# ------------------------------------------------------------------------------------------ how code is looked at


def test_wrmsr_is_seen_in_any_mapping() -> None:
    """The program runs at a high linear address that the guest maps itself, and sends its IPI from there."""
    high = 0xFFFF_8000_0000_0000
    tables = b"\xb8" + G.word(0x1_0000) + b"\x0f\x22\xd8"  # mov cr3
    jump = b"\x48\xb8" + struct.pack("<Q", high + 0x8000) + b"\xff\xe0"  # mov rax; jmp rax
    host = guest(STI + tables + jump)
    host.load(0x1_0000, struct.pack("<Q", 0xFFFF_2003))  # low memory and the GDT as they were
    host.load(0x1_0000 + 256 * 8, struct.pack("<Q", 0x1_1003))
    host.load(0x1_1000, struct.pack("<Q", 0x1_2003))
    host.load(0x1_2000, struct.pack("<Q", 0x83))
    host.load(0x8000, SELF + STOP)
    assert host.run(instructions=LONG) is Ended.IDLE
    assert returned(host, IPI) == high + 0x8000 + len(SELF)


def test_wrmsr_is_seen_in_code_that_the_guest_wrote() -> None:
    copy = b"\xbe" + G.word(0x8000) + b"\xbf" + G.word(0xA100) + b"\xb9" + G.word(64) + b"\xf3\xa4"  # rep movsb
    host = guest(STI + copy + b"\xb8" + G.word(0xA100) + b"\xff\xe0")  # mov eax; jmp rax
    host.load(0x8000, SELF + STOP)
    assert host.run(instructions=LONG) is Ended.IDLE
    assert returned(host, IPI) == 0xA100 + len(SELF)


def test_instruction_across_two_pages() -> None:
    host = guest(STI + b"\xb8" + G.word(0x8FFF - len(SELF) + 2) + b"\xff\xe0")  # its 0f is the page's last byte
    start = 0x8FFF - len(SELF) + 2
    host.load(start, SELF + STOP)
    assert start + len(SELF) - 1 == 0x9000
    host.cpus[0]["rsp"] = 0xB000
    assert host.run(instructions=LONG) is Ended.IDLE
    assert returned(host, IPI) == 0x9001


def test_same_run_twice() -> None:
    def state() -> tuple[object, ...]:
        host = example().build(3, 7, quantum=37)
        host.run(instructions=100_000)
        digest = hashlib.sha256(host.memory).hexdigest()
        return digest, host.clock, [(cpu.registers, cpu.counters, cpu.instructions) for cpu in host.cpus]

    assert state() == state()


def test_counters() -> None:
    host = guest(STI + SELF + STOP, ipiv=True)
    host.run(instructions=LONG)
    counters = host.cpus[0].counters
    assert counters.paths == {Taken.HARDWARE: 2, Taken.FAST: 1}  # IPI and EOI; HLT
    assert (counters.ipis, counters.ipis_fast, counters.taken) == (1, 0, {IPI: 1})


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"\xcd\x77", "CPU 0 at 0x1008: triple fault, vector 0x77 has no usable gate"),
        (b"\x31\xc9\xf7\xf1", "CPU 0 at 0x100a: triple fault, vector 0x0 has no usable gate"),  # xor ecx, ecx; div ecx
    ],
)
def test_guest_that_cannot_go_on(code: bytes, message: str) -> None:
    with pytest.raises(GuestError) as error:
        guest(code).run(instructions=LONG)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_bad_arguments() -> None:
    m = fx.Machine(vcpus=1)
    for arguments, message in (
        ({"memory": 0}, "memory 0x0 is not a whole number of pages"),
        ({"memory": 4097}, "not a whole number of pages"),
        ({"memory": 1 << 40}, "out of range"),
        ({"quantum": 0}, "quantum 0"),
        ({"mips": 0}, "mips 0"),
    ):
        with pytest.raises(ValueError, match=message):
            UnicornHost(m, **arguments)
    with pytest.raises(TypeError, match=r"not a fastexit\.Machine"):
        UnicornHost(3)  # type: ignore[arg-type]
    host = UnicornHost(m)
    with pytest.raises(ValueError, match="no CPU has been started"):
        host.run(instructions=LONG)
    with pytest.raises(ValueError, match="beyond the guest's 0x100000"):
        host.load(0xF_FFFF, b"ab")
    with pytest.raises(TypeError, match="until is int"):
        host.run(3)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="no register"):
        host.cpus[0]["rxx"]


def test_what_is_no_address() -> None:
    host = UnicornHost(fx.Machine(vcpus=1))
    cpu = host.cpus[0]
    for call, error, message in (
        (lambda: cpu.start("a"), TypeError, "rip is str, not an integer"),
        (lambda: cpu.start(-1), ValueError, "rip -0x1 is out of range"),
        (lambda: cpu.start(0, rsp=1 << 62), ValueError, "rsp 0x4000000000000000 is not a canonical address"),
        (lambda: idt({256: 0}), ValueError, "vector 0x100 is out of range"),
        (lambda: idt({-1: 0}), ValueError, "vector -0x1 is out of range"),
        (lambda: idt({1: "x"}), TypeError, "handler of vector 0x1 is str, not an integer"),
        (lambda: idt({1: 0}, selector=1 << 16), ValueError, "selector 0x10000 is out of range"),
        (lambda: host.load(0, "x"), TypeError, "data is str, not bytes"),
        (lambda: UnicornHost(host.machine), ValueError, "the machine has a host already"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_until_that_raises() -> None:
    host = guest(SPIN, quantum=10)
    rounds = iter(range(3))
    with pytest.raises(StopIteration):
        host.run(lambda host: next(rounds) < 0)
    assert host.clock == 30
    assert host.run(instructions=5) is Ended.INSTRUCTIONS
    assert (host.clock, host.machine.time) == (35, 35)


def test_page_of_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    """Its program does what it says."""
    page = (Path(__file__).parents[1] / "docs" / "unicorn.md").read_text()
    exec(page.split("```python\n", 1)[1].split("```", 1)[0], {})
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "Ended.IDLE"
    assert second.startswith("1 1 50")


def test_missing_unicorn_is_one_line() -> None:
    code = "import sys; sys.modules['unicorn'] = None\nimport fastexit.adapters.unicorn"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ImportError: unicorn is not installed: pip install unicorn"


# --------------------------------------------------------------------------------------------------------- devices


def out(port: int, value: int) -> bytes:
    """mov edx, port; mov al, value; out dx, al."""
    return b"\xba" + G.word(port) + b"\xb0" + bytes((value,)) + b"\xee"


def into(port: int, place: int) -> bytes:
    """mov edx, port; in al, dx; mov [place], al."""
    return b"\xba" + G.word(port) + b"\xec" + b"\x88\x04\x25" + G.word(place)


def pin(number: int, entry: int) -> bytes:
    """Program a pin of the IOAPIC, for CPU 0."""
    halves = ((0x11 + 2 * number, 0), (0x10 + 2 * number, entry))
    return b"".join(G.poke(0xFEC0_0000, index) + G.poke(0xFEC0_0010, value) for index, value in halves)


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_the_ioapic_delivers_a_line(machine: dict[str, object]) -> None:
    """A level interrupt comes again at its EOI as long as the line is up, and a guest reads what it wrote."""
    host = guest(pin(17, 0x8000 | IPI) + G.peek(0xFEC0_0010, 0x500) + STI + SPIN, quantum=20, **machine)
    host.run(instructions=100)
    assert read(host, 0x500) == 0x8000 | IPI
    assert count(host, IPI) == 0
    host.machine.irq_line(17, 1)
    assert host.run(lambda host: count(host, IPI) >= 3, instructions=1000) is Ended.UNTIL
    host.machine.irq_line(17, 0)
    host.run(instructions=1000)
    taken = count(host, IPI)
    assert 3 <= taken <= 5  # what was under way
    host.machine.irq_line(17, 1)
    host.machine.irq_line(17, 0)
    host.run(instructions=1000)
    assert count(host, IPI) == taken + 1
    assert host.cpus[0].counters.devices == 5


@pytest.mark.parametrize("machine", MACHINES, ids=str)
def test_the_pics_and_the_pit_by_their_ports(machine: dict[str, object]) -> None:
    """IRQ 0 by way of LINT0, each tick ended at port 0x20; a sleeping CPU is woken by it."""
    setup = b"".join(out(*write) for write in ((0x20, 0x11), (0x21, IPI), (0x21, 4), (0x21, 1), (0x21, 0xFE)))
    timer = b"".join(out(*write) for write in ((0x43, 0x34), (0x40, 0xA9), (0x40, 0x04)))
    again = into(0x21, 0x504) + STI + HLT + b"\xeb\xfd"  # jmp to the hlt
    host = guest(wrmsr(0x835, 0x700) + setup + timer + again, **machine)
    host.machine.create_pit()
    ends = b"\x50\x52" + bump(G.COUNTS + 8 * IPI) + out(0x20, 0x20) + b"\x5a\x58" + G.IRETQ
    host.load(G.HANDLERS, ends)
    host.run(instructions=10_500_000)
    assert read(host, 0x504) & 0xFF == 0xFE
    assert count(host, IPI) == 10


def test_a_port_where_nobody_is() -> None:
    """It leaves to user space, which has no device there: all ones, and the guest goes on."""
    host = guest(put(0x500, 0) + into(0x3F8, 0x500) + out(0x3F8, 65) + STOP)
    assert host.run(instructions=LONG) is Ended.IDLE
    assert read(host, 0x500) == 0xFF
    split = guest(put(0x500, 0) + into(0x21, 0x500) + STOP, irqchip="split")
    assert split.run(instructions=LONG) is Ended.IDLE
    assert read(split, 0x500) == 0xFF
