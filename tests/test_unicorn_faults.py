"""What a guest finds on its stack, and what comes of gates and stacks that are no good: SDM 3A, chapter 6."""

from __future__ import annotations

import struct

import pytest

pytest.importorskip("unicorn", reason="unicorn is not installed")

from unicorn import x86_const

import unicorn_guest as G
from fastexit.adapters.unicorn import Ended, GuestError
from unicorn_guest import NOP, SPIN, STI, STOP, at, bump, count, gate, guest, put, read, returned, wrmsr

IPI, DB, UD, DF, TS, NP, SS, GP, PF = 0x40, 1, 6, 8, 10, 11, 12, 13, 14
RF, TF, IF = 1 << 16, 1 << 8, 1 << 9
KEEPS, FOUND, TASK, TASK_SELECTOR, IST_STACK = 0xF000, 0x500, 0x1C000, 0x28, 0x1B000
NOWHERE, NOT_CANONICAL = 0x123_0000_0000, 1 << 63
SELF = wrmsr(G.SELF_IPI, IPI)
BAD = wrmsr(G.X2APIC_ICR, 1 << 20 | IPI)
"""A reserved bit."""
HANDLER, ON_NO_PAGE, ON_IST, NOT_ON_A_STACK = (gate(KEEPS, ist=n) for n in range(4))
INT_77 = b"\xcd\x77"


def set_rsp(value: int) -> bytes:
    return b"\x48\xbc" + struct.pack("<Q", value)  # mov rsp


def found(code: bytes, gates: dict[int, bytes], *, error: bool = True, limit: int = 0x67) -> tuple[int, ...]:
    """On the stack of the handler at KEEPS: error code, RIP, CS, RFLAGS, RSP, SS, and then its own RSP.

    The gates' IST1 is a stack that no page is mapped for, IST2 a good one, IST3 no address at all.
    """
    host = guest(code, vectors=())
    host.load(KEEPS, G.keep_frame(FOUND))
    host.load(G.IDT, b"".join(gates.get(vector, bytes(16)) for vector in range(256)))
    host.load(TASK + 36, struct.pack("<3Q", NOWHERE, IST_STACK, NOT_CANONICAL))
    host.cpus[0].uc.reg_write(x86_const.UC_X86_REG_TR, (TASK_SELECTOR, TASK, limit, 0x8B00))
    assert host.run(instructions=500) is Ended.IDLE
    assert host.cpus[0]["rip"] & ~0xFFF == KEEPS
    words = struct.unpack_from("<7Q", host.memory, FOUND)
    return words if error else words[:5] + words[6:]


# ------------------------------------------------------------------------------------------------------------ frames


@pytest.mark.parametrize("low", range(0, 16, 4))
def test_frame_of_a_fault(low: int) -> None:
    """Error code 0, RIP at the WRMSR, RF for its second try, the old stack, and a new one on a multiple of 16."""
    before = set_rsp(G.STACK - low) + STI
    rip, flags = at(before, BAD) - 2, 2 | IF | RF
    assert found(before + BAD, {GP: HANDLER}) == (0, rip, 8, flags, G.STACK - low, 0x10, (G.STACK - low & ~0xF) - 48)


def test_frame_of_an_interrupt_on_its_own_stack() -> None:
    got = found(STI + SELF, {IPI: ON_IST}, error=False)
    assert got == (at(STI, SELF), 8, 2 | IF, G.STACK, 0x10, IST_STACK - 40)


def test_int_n_has_no_rf_and_undefined_instruction_has() -> None:
    assert found(INT_77, {0x77: HANDLER}, error=False)[:3] == (at(INT_77), 8, 2)
    assert found(b"\x0f\x0b", {UD: HANDLER}, error=False)[:3] == (at(), 8, 2 | RF)


# ------------------------------------------------------------------------------------------------ faults on the way

IPI_AT = at(STI, SELF)


@pytest.mark.parametrize(
    ("code", "gates", "error", "rip"),
    [
        # No gate: #GP, whose EXT is clear for INT n alone, which is then begun again.
        (INT_77, {GP: HANDLER}, 0x77 << 3 | 2, at()),
        (STI + SELF, {GP: HANDLER}, IPI << 3 | 3, IPI_AT),
        (STI + SELF, {IPI: gate(KEEPS, attributes=0x0E), NP: HANDLER}, IPI << 3 | 3, IPI_AT),
        (STI + SELF, {IPI: gate(KEEPS, attributes=0x85), GP: HANDLER}, IPI << 3 | 3, IPI_AT),
        # No code segment: null, beyond the table, data, 16 bits.
        (STI + SELF, {IPI: gate(KEEPS, selector=0), GP: HANDLER}, 1, IPI_AT),
        (STI + SELF, {IPI: gate(KEEPS, selector=0x80), GP: HANDLER}, 0x81, IPI_AT),
        (STI + SELF, {IPI: gate(KEEPS, selector=0x10), GP: HANDLER}, 0x11, IPI_AT),
        (STI + SELF, {IPI: gate(KEEPS, selector=0x18), GP: HANDLER}, 0x19, IPI_AT),
        (STI + SELF, {IPI: gate(NOT_CANONICAL), GP: HANDLER}, 1, IPI_AT),
        # No stack: no page (a write, so 2), no address.
        (STI + SELF, {IPI: ON_NO_PAGE, PF: ON_IST}, 2, IPI_AT),
        (STI + SELF, {IPI: NOT_ON_A_STACK, SS: HANDLER}, 1, IPI_AT),
        # The second fault: benign and anything, contributory and #PF are taken one by one, the rest is #DF.
        (BAD, {GP: ON_NO_PAGE, PF: ON_IST}, 2, at(BAD) - 2),
        (BAD, {DF: HANDLER}, 0, at(BAD) - 2),
        (STI + SELF, {IPI: ON_NO_PAGE, DF: ON_IST}, 0, IPI_AT),
        (STI + SELF, {IPI: ON_NO_PAGE, PF: ON_NO_PAGE, DF: ON_IST}, 0, IPI_AT),
        # INT 13 is no #GP: nothing here is contributory before the missing gate.
        (b"\xcd\x0d", {GP: NOT_ON_A_STACK, SS: HANDLER}, 0, at()),
    ],
)
def test_fault_on_the_way(code: bytes, gates: dict[int, bytes], error: int, rip: int) -> None:
    assert found(code, gates)[:2] == (error, rip)


def test_stack_that_may_not_be_written_and_page_fault_address() -> None:
    """With CR0.WP a page that is there: error code 3, and CR2 says which."""
    readonly = 0x40_0000
    tables = b"\xb8" + G.word(0x1_0000) + b"\x0f\x22\xd8"  # mov cr3
    wp = b"\x0f\x20\xc0\x0d" + G.word(1 << 16) + b"\x0f\x22\xc0"  # or CR0.WP
    code = tables + wp + set_rsp(readonly + 0x1000) + STI + SELF
    host = guest(code, vectors=())
    host.load(KEEPS, G.keep_frame(FOUND))
    host.load(G.IDT + 16 * IPI, HANDLER)
    host.load(G.IDT + 16 * PF, ON_IST)
    host.load(TASK + 36, struct.pack("<3Q", NOWHERE, IST_STACK, NOT_CANONICAL))
    host.cpus[0].uc.reg_write(x86_const.UC_X86_REG_TR, (TASK_SELECTOR, TASK, 0x67, 0x8B00))
    host.load(0x1_0000, struct.pack("<Q", 0x1_1003))
    host.load(0x1_1000, struct.pack("<4Q", 0x1_2003, 0, 0, 0xFFFF_6003))  # the last GiB as the firmware has it
    host.load(0x1_2000, struct.pack("<3Q", 0x83, 0x83, 0x81))  # 4 MiB: not writable
    assert host.run(instructions=500) is Ended.IDLE
    assert read(host, FOUND) == 3
    assert host.cpus[0]["cr2"] == readonly + 0x1000 - 40


def test_task_state_that_is_too_short() -> None:
    assert found(STI + SELF, {IPI: ON_IST, TS: HANDLER}, limit=36)[0] == TASK_SELECTOR | 1


def test_no_gate_at_all_is_a_triple_fault() -> None:
    with pytest.raises(GuestError, match="CPU 0 at 0x1008: triple fault, vector 0x77 has no usable gate"):
        guest(INT_77, vectors=()).run(instructions=500)


def test_page_fault_on_a_fetch_has_an_error_code_and_int_14_has_none() -> None:
    jump = b"\xff\x24\x25" + G.word(0x600)
    host = guest(jump, vectors=())
    host.load(0x600, struct.pack("<Q", NOWHERE))
    host.load(KEEPS, G.keep_frame(FOUND))
    host.load(G.IDT + 16 * PF, HANDLER)
    assert host.run(instructions=500) is Ended.IDLE
    assert struct.unpack_from("<3Q", host.memory, FOUND) == (0, NOWHERE, 8)  # without NX nobody tells fetches
    assert host.cpus[0]["cr2"] == NOWHERE
    assert found(b"\xcd\x0e", {PF: HANDLER}, error=False)[:3] == (at(b"\xcd\x0e"), 8, 2)


# ----------------------------------------------------------------------------------- between and behind instructions


def test_run_of_sti_blocks_one_instruction() -> None:
    host = guest(SELF + STI * 50 + STOP)
    host.run(instructions=500)
    assert returned(host, IPI) == at(SELF, STI * 2)


@pytest.mark.parametrize(
    ("load", "shadowed"),
    [
        (b"\x8e\x14\x25" + G.word(0x504), NOP),  # mov ss, [0x504]
        (b"\x66\x8e\xd0", NOP),  # mov ss, ax
        (b"\x8e\xd0", NOP),
        (b"\x8e\xd0", b"\x8e\xd0"),
        (b"\x8e\xd8", b""),  # mov ds, eax
    ],
)
def test_stack_segment_behind_sti(load: bytes, shadowed: bytes) -> None:
    """Within one slice: STI blocks the load, the load the next instruction, and a second load nothing more."""
    before = put(0x504, 0x10) + b"\xb8" + G.word(0x10) + STI + load + shadowed
    host = guest(wrmsr(G.SELF_IPI, IPI) + before + NOP * 10 + STOP)
    host.run(instructions=500)
    assert returned(host, IPI) == at(SELF, before)


@pytest.mark.parametrize("machine", [{}, {"apicv": False}, {"vendor": "svm"}], ids=str)
def test_nmi_waits_for_the_shadow_to_pass(machine: dict[str, object]) -> None:
    """MOV SS shadows a WRMSR that sends the CPU an NMI: it comes behind that, before a shadow of the next MOV SS."""
    nmi = wrmsr(G.X2APIC_ICR, 0x4_0400)
    before = b"\xbf" + G.word(0x10) + nmi[:-2] + b"\x8e\xd7" + nmi[-2:]  # mov edi; mov ss, edi
    host = guest(before + NOP * 10 + STOP, vectors=(2,), **machine)
    host.run(instructions=500)
    assert (count(host, 2), returned(host, 2)) == (1, at(before))


def test_nmi_from_outside_behind_mov_ss() -> None:
    before = b"\xb8" + G.word(0x10) + b"\x8e\xd0"
    host = guest(before + NOP * 100 + STOP, vectors=(2,))
    host.run(instructions=3)
    assert host.cpus[0]["rip"] == at(before)
    host.machine.signal_msi(G.XAPIC, 0x400)
    host.run(instructions=100)
    assert returned(host, 2) == at(before, NOP)


def test_single_step_over_what_the_host_carries_out() -> None:
    """#DB behind each: three MOV, WRMSR, CPUID, RDTSC, MOV CR8, PUSHF, AND, POPF; DR6.BS says so."""
    on = b"\x9c\x81\x0c\x24" + G.word(TF) + b"\x9d"  # pushf; or [rsp]; popf
    steps = (wrmsr(G.X2APIC_TPR, 0), b"\x0f\xa2", b"\x0f\x31", b"\x44\x0f\x20\xc0")
    off = b"\x9c\x81\x24\x24" + G.word(~TF) + b"\x9d"
    host = guest(on + b"".join(steps) + off + STOP, vectors=())
    dr6 = b"\x0f\x21\xf0\x48\x89\x04\x25" + G.word(0x508)  # mov rax, dr6; mov [0x508], rax
    host.load(0xF000, b"\x50" + bump(0x500) + dr6 + b"\x58" + G.IRETQ)
    host.load(G.IDT + 16 * DB, gate(0xF000))
    assert host.run(instructions=500) is Ended.IDLE
    assert read(host, 0x500, 4) == 10
    assert read(host, 0x508) >> 14 & 1 == 1


def test_resume_flag_is_gone_behind_the_instruction() -> None:
    """A handler that leaves RF set and steps over nothing: RDTSC is carried out, and RF is clear behind it."""
    frame = b"".join(b"\x68" + G.word(value) for value in (0x10, 0x9000, 2 | RF, 8, 0x8000)) + G.IRETQ
    host = guest(frame)
    host.load(0x8000, b"\x0f\x31\x9c\x58" + G.keep(0x500) + STOP)  # rdtsc; pushf; pop rax
    host.run(instructions=500)
    assert read(host, 0x500, 4) == 2


def test_instruction_that_cannot_be_decoded_counts() -> None:
    """Its handler is itself, on an IST stack: nothing else could end the run."""
    host = guest(b"\x0f\xff\xff", vectors=())
    host.load(G.IDT + 16 * UD, gate(at(), ist=2))
    host.load(TASK + 36, struct.pack("<3Q", NOWHERE, IST_STACK, NOT_CANONICAL))
    host.cpus[0].uc.reg_write(x86_const.UC_X86_REG_TR, (TASK_SELECTOR, TASK, 0x67, 0x8B00))
    assert host.run(instructions=200) is Ended.INSTRUCTIONS


def test_init_unmasks_nmis() -> None:
    """INIT while an NMI is handled: the CPU that SIPI starts takes the next one, once."""
    nmi, init, sipi = (wrmsr(G.X2APIC_ICR, 1 << 32 | low) for low in (0x400, 0x4500, 0x4608))
    code = NOP * 20 + nmi + NOP * 60 + init + NOP * 30 + sipi + NOP * 60 + nmi + NOP * 60 + STOP
    host = guest(code, SPIN, vectors=(), quantum=10)
    host.load(0xF000, SPIN)
    host.load(G.IDT + 16 * 2, gate(0xF000))
    host.load(4 * 2, struct.pack("<HH", 0x100, 0x800))
    host.load(0x8000, SPIN)
    host.load(0x8100, bytes.fromhex("ff060005") + SPIN)  # inc word [0x500]
    host.run(instructions=400)
    assert (host.cpus[1].counters.taken, read(host, 0x500, 2)) == ({2: 2}, 1)


# -------------------------------------------------------------------------------------------- how code is looked at


@pytest.mark.parametrize("prefix", [b"\x3e", b"\x2e", b"\x66", b"\x40", b"\x48", b"\xf2\x41"], ids=bytes.hex)
def test_prefixes_that_do_nothing(prefix: bytes) -> None:
    code = STI + SELF[:-2] + prefix + SELF[-2:]
    host = guest(code + STOP)
    assert host.run(instructions=500) is Ended.IDLE
    assert returned(host, IPI) == at(code)


@pytest.mark.parametrize(
    "invlpg", [b"\x0f\x01\x3c\x25" + G.word(0x4000_0000), b"\x0f\x01\x3b", b"\x41\x0f\x01\x7c\x24\x00"], ids=bytes.hex
)
def test_page_that_moves_under_the_code(invlpg: bytes) -> None:
    """The second call of one linear address runs another page: by INVLPG of an absolute address, [rbx], [r12 + 0]."""
    high, pte = 0x4000_0000, 0x1_3000
    call = b"\xbb" + G.word(high) + b"\x49\x89\xdc\xff\xd3"  # mov ebx; mov r12, rbx; call rbx
    code = b"\xb8" + G.word(0x1_0000) + b"\x0f\x22\xd8" + call + put(pte, 0xA003) + invlpg + call
    host = guest(STI + code + STOP)
    host.load(0x1_0000, struct.pack("<Q", 0x1_1003))
    host.load(0x1_1000, struct.pack("<4Q", 0xFFFF_3003, 0x1_2003, 0, 0xFFFF_6003))
    host.load(0x1_2000, struct.pack("<Q", pte | 3))
    host.load(pte, struct.pack("<Q", 0x8003))
    host.load(0x8000, NOP * len(SELF) + b"\xc3")
    host.load(0xA000, SELF + b"\xc3")
    assert host.run(instructions=500) is Ended.IDLE
    assert returned(host, IPI) == high + len(SELF)


# ------------------------------------------------------------------------------------------------------- registers


def test_upper_halves() -> None:
    """WRMSR does not look at them; RDMSR and RDTSC clear them."""
    rax, rcx, rdx = (b"\x48" + bytes((0xB8 + n,)) for n in range(3))  # mov r64, imm64

    def high(low: int) -> bytes:
        return struct.pack("<II", low, 0xFFFF_FFFF)

    keep = b"".join(b"\x48\x89" + bytes((r << 3 | 4, 0x25)) + G.word(0x500 + 8 * i) for i, r in enumerate((0, 2)))
    wr = rcx + high(0x80F) + rax + high(0x1FF) + rdx + high(0) + b"\x0f\x30"
    garbage = rcx + high(0x802) + rax + high(0x1FF) + rdx + high(7)
    for read_it in (b"\x0f\x32", b"\x0f\x31"):
        host = guest(wr + garbage + read_it + keep + STOP)
        assert host.run(instructions=500) is Ended.IDLE
        assert host.cpus[0].vcpu.get_msr(0x80F) == 0x1FF
        got = struct.unpack_from("<2Q", host.memory, 0x500)
        assert got[1] == 0
        assert got[0] < 1000


def test_cpuid_says_what_the_apic_is() -> None:
    def cpuid(leaf: int, subleaf: int, to: int) -> bytes:
        code = b"\xb8" + G.word(leaf) + b"\xb9" + G.word(subleaf) + b"\x0f\xa2"
        return code + b"".join(bytes((0x89, 4 | r << 3, 0x25)) + G.word(to + 4 * i) for i, r in enumerate((0, 3, 1, 2)))

    levels = b"".join(cpuid(0xB, i, 0x520 + 16 * i) for i in range(3))
    code = cpuid(1, 0, 0x500) + wrmsr(0x1B, 0xFEE0_0000) + cpuid(1, 0, 0x510) + levels
    host = guest(b"", b"", b"", code + STOP)
    assert host.run(instructions=500) is Ended.IDLE
    on, off, smt, core, none = (struct.unpack_from("<4I", host.memory, 0x500 + 16 * i) for i in range(5))
    assert (on[1] >> 24, on[3] >> 9 & 1, off[3] >> 9 & 1) == (3, 1, 0)
    assert (smt, core, none) == ((0, 1, 0x100, 3), (0, 1, 0x201, 3), (0, 0, 2, 3))
