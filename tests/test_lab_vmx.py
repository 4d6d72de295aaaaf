"""The VMX side of the lab: Bochs and what it boots, programs of guests, what differs and why; a kernel too."""

from __future__ import annotations

import json
import random
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fastexit as fx
from fastexit import cli
from fastexit import regs as R
from fastexit.kvm.host import KvmUnavailable
from fastexit.kvm.lab import bochs, elf, kernels, mends, paths, vmx, vmxboot, vmxcode, vmxcompare, vmxdraw, vmxrun
from fastexit.kvm.lab import vmxwire as W
from fastexit.kvm.lab.vmxmodel import Seen, Setup
from fastexit.kvm.lab.vmxsteps import Step

X2, SELF_IPI = R.MSR_X2APIC_BASE, R.MSR_X2APIC_SELF_IPI


def ipi(vcpu: int, dest: int, vector: int) -> Step:
    return Step(vcpu, "wrmsr", (R.MSR_X2APIC_ICR, R.icr(dest, vector)))


# ---------------------------------------------------------------------------------------------------------------- Bochs


def program(jumps: int = 1, texts: int = 1) -> bytes:
    """A 64-bit ELF file of one code segment: jumps to an instruction that loads the address of the test's message."""
    base, at = 0x400000, 0x1000
    text = (bochs.GUARDED + b"\0") * texts
    head = b"\x7fELF\x02" + bytes(27) + struct.pack("<Q", 64) + bytes(16) + struct.pack("<H", 1)
    code = bytearray(b"\x90" * 256)
    for n in range(jumps):
        struct.pack_into("<2si", code, 16 * n, bochs.JNE, 128 - 16 * n - 6)
    struct.pack_into("<3si", code, 128, b"\x48\x8d\x35", len(code) - 128 - 7)
    whole = bytes(code) + text
    segment = struct.pack("<IIQQQQQQ", 1, 5, at, base + at, 0, len(whole), len(whole), 0)
    return (head.ljust(64, b"\0") + segment).ljust(at, b"\0") + whole


def test_the_test_of_descriptors_is_found_by_its_message() -> None:
    assert bochs.guard(program()) == 0x1000
    data = bytearray(b"\x90" * 0x1000) + program()[0x1000:]
    with pytest.raises(kernels.KernelMissing, match="no program of 64 bits"):
        bochs.guard(bytes(data))


@pytest.mark.parametrize(
    ("jumps", "texts", "said"),
    [(0, 1, "0 jumps lead"), (2, 1, "2 jumps lead"), (1, 0, "another text"), (1, 2, "another text")],
)
def test_a_bochs_that_is_not_known_is_not_patched(jumps: int, texts: int, said: str) -> None:
    with pytest.raises(kernels.KernelMissing, match=said) as raised:
        bochs.guard(program(jumps, texts))
    assert len(str(raised.value).splitlines()) == 1


FILLED = 0x400
NAMES = (mends.TAKES_INTERRUPT, mends.ENTERS, mends.INJECTS, mends.SETS_MASKS, mends.NOTIFIED)


def functions(names: tuple[str, ...] = NAMES) -> bytes:
    """A 64-bit ELF file of functions that are shown by their names, each filled with its number."""
    base, at = 0x400000, 0x1000
    code = b"".join(bytes((n + 1,)) * FILLED for n in range(len(names)))
    text, table = b"\0", b""
    for n, name in enumerate(names):
        table += struct.pack("<IBBHQQ", len(text), 0x12, 0, 1, base + at + FILLED * n, FILLED)
        text += name.encode() + b"\0"
    sections = at + len(code) + len(table) + len(text)
    head = b"\x7fELF\x02" + bytes(27) + struct.pack("<QQ", 64, sections) + bytes(8)
    head += struct.pack("<HHHH", 1, 64, 2, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, at, base + at, 0, len(code), len(code), 0)
    end = struct.pack("<IIQQQQIIQQ", 0, 11, 0, 0, at + len(code), len(table), 1, 0, 0, 0)
    end += struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, at + len(code) + len(table), len(text), 0, 0, 0, 0)
    return (head.ljust(64, b"\0") + segment).ljust(at, b"\0") + code + table + text + end


@pytest.fixture
def known_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mends that expect what `functions` has."""
    whole, parts, where = functions(), elf.segments(functions()), elf.symbols(functions())

    def now(mend: mends.Mend) -> mends.Mend:
        at, count = elf.place(parts, where[mend.function] + mend.offset), mend.was[1]
        return replace(mend, was=(mends.digest(whole[at : at + count]), count))

    monkeypatch.setattr(mends, "MENDS", tuple(map(now, mends.MENDS)))


def test_mends_come_where_they_belong_and_call_what_they_name(known_code: None) -> None:
    old, new, where = functions(), mends.mended(functions()), elf.symbols(functions())
    assert len(new) == len(old)
    changed = set()
    for mend in mends.MENDS:
        begin = where[mend.function] + mend.offset
        at = elf.place(elf.segments(old), begin)
        changed |= set(range(at, at + len(mend.code)))
        for offset, name, beyond in mend.calls:
            (distance,) = struct.unpack_from("<i", new, at + offset)
            assert begin + offset + 4 + distance == where[name] + beyond
            assert new[at + offset - 1] in (0xE8, 0xE9)
    assert {n for n, (one, other) in enumerate(zip(old, new, strict=True)) if one != other} <= changed
    assert len(mends.MENDS[0].code) == mends.MENDS[0].was[1], "behind it is code that stays"


def test_a_bochs_of_other_code_is_not_mended(known_code: None) -> None:
    with pytest.raises(ValueError, match=f"has no {mends.SETS_MASKS}"):
        mends.mended(functions(tuple(name for name in NAMES if name != mends.SETS_MASKS)))
    for mend in mends.MENDS:
        other = bytearray(functions())
        other[elf.place(elf.segments(other), elf.symbols(other)[mend.function] + mend.offset)] ^= 0xFF
        with pytest.raises(ValueError, match="other code at"):
            mends.mended(bytes(other))
    with pytest.raises(ValueError, match="nothing at 0x1"):
        elf.place(elf.segments(functions()), 1)


def test_a_missing_bochs_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("FASTEXIT_BOCHS", str(tmp_path))
    kernel = kernels.Kernel("6.1.1", "6.1.1", tmp_path / "vmlinuz", tmp_path)
    monkeypatch.setattr(kernels, "find", lambda version: kernel)
    assert cli.main(["verify", "--kernel", "6.1", "--vendor", "vmx"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "fastexit kernels get bochs" in line


# ----------------------------------------------------------------------------------------------------------------- boot


def test_the_loader_is_a_rom() -> None:
    rom = vmxboot.loader(0x1000_0000)
    assert rom[:3] == b"\x55\xaa\x01"
    assert len(rom) == 512
    assert sum(rom) & 0xFF == 0


def test_memory_images_hold_kernel_initramfs_and_parameters(tmp_path: Path) -> None:
    image = bytearray(3 * 512)
    image[0x1F1], image[0x201], image[0x202:0x206] = 1, 0x6A, b"HdrS"
    (tmp_path / "vmlinuz").write_bytes(bytes(image) + b"K" * 100)
    kernel = kernels.Kernel("6.1.1", "6.1.1", tmp_path / "vmlinuz", tmp_path)
    lines = vmxboot.place(kernel, b"I" * 5000, tmp_path, extra="one=two")
    assert [line.split("=")[-1] for line in lines[:2]] == [f"{vmxboot.KERNEL_AT:#x}", f"{vmxboot.INITRAMFS_AT:#x}"]
    assert (tmp_path / "memory-1000000").read_bytes()[512:] == b"K" * 100
    packed = (tmp_path / "memory-10000000").read_bytes()
    page = packed[8192:]
    assert packed[:5000] == b"I" * 5000
    assert struct.unpack_from("<II", page, 0x218) == (vmxboot.INITRAMFS_AT, 5000)
    (line_at,) = struct.unpack_from("<I", page, 0x228)
    line = packed[line_at - vmxboot.INITRAMFS_AT :].partition(b"\0")[0]
    assert line.endswith(b" one=two")
    (tmp_path / "vmlinuz").write_bytes(bytes(1024))
    with pytest.raises(kernels.KernelMissing, match="no bzImage"):
        vmxboot.place(kernel, b"", tmp_path)


# ----------------------------------------------------------------------------------------------------------------- wire


def test_the_init_has_the_same_numbers() -> None:
    source = (Path(vmx.__file__).parent / "vmxinit.c").read_text()
    (line,) = [line for line in source.splitlines() if line.startswith("enum op")]
    names = [name.strip().rstrip("_") for name in line.partition("{")[2].partition("}")[0].split(",")]
    assert names == [op.name for op in W.Op]
    assert f"BATON_AT = {vmxcode.BATON_AT:#x}" in source


def test_answers_are_sorted() -> None:
    lines = ["@ioctl 1 0a0b", "@parked 1 0 2 48 0", "@file", "a", "@read 0 00", "@end", "@stuck vCPU 1", "@read 0 ff"]
    answer = W.Answer.of(lines)
    assert answer.ioctls == [(1, b"\x0a\x0b")]
    assert answer.files == [["a", "@read 0 00"]]
    assert (answer.reads, answer.stuck) == ([b"\xff"], ["vCPU 1"])
    assert answer.parked[0].port == 48


# --------------------------------------------------------------------------------------------------- programs, compared


def done(steps: list[Step], setup: Setup | None = None, kernel: str = "6.12") -> Seen:
    return vmx.played(setup or Setup(), steps, kernel).end()


def test_a_running_receiver_takes_a_posted_interrupt_without_an_exit() -> None:
    seen = done([Step(1, "sti"), ipi(0, 1, 0xFD)])
    assert seen.notes == [[], [(1, 0xFD)]]
    assert [line for line in seen.lines["v1"] if "kvm_exit" in line and "IO_INSTRUCTION" not in line] == []
    assert "d kvm_apicv_accept_irq: apicid 1 vec 253 (Fixed|edge)" in seen.lines["v0"]


def test_a_sleeper_wakes_up_and_one_that_nobody_wakes_sleeps_to_the_end() -> None:
    seen = done([Step(1, "halt"), ipi(0, 1, 0xE0)])
    assert seen.notes[1] == [(1, 0xE0)]
    assert seen.asleep == [False, False]
    assert done([Step(1, "halt"), ipi(0, 0, 0xE0)]).asleep == [False, True]
    with pytest.raises(ValueError, match="vCPU 1 sleeps"):
        done([Step(1, "halt"), Step(1, "sti")])


def test_a_refused_write_is_a_fault_and_a_deadline_comes() -> None:
    seen = done([Step(0, "wrmsr", (X2 + 8, 0x100))])
    assert seen.results[0] == (vmxcode.FAULTED_GP, 0, 0)
    timer = Step(0, "wrmsr", (X2 + (R.APIC_LVTT >> 4), R.LVT_TIMER_DEADLINE | 0x31))
    steps = [Step(0, "sti"), timer, Step(0, "deadline", (400_000,)), Step(1, "spend", (700_000,))]
    assert done(steps).notes[0] == [(3, 0x31)]


def test_without_apicv_an_interrupt_is_injected_after_a_kick() -> None:
    seen = done([Step(1, "sti"), ipi(0, 1, 0xFD)], Setup(apicv=False))
    assert seen.notes[1] == [(1, 0xFD)]
    assert any("kvm_inj_virq: IRQ 0xfd" in line for line in seen.lines["v1"])
    assert vmxcompare.normal([". kvm_exit: reason EXTERNAL_INTERRUPT", ". kvm_msr: a", "d kvm_entry: b"], EVENTS) == [
        ". kvm_msr: a"
    ]


EVENTS = frozenset({"kvm_exit", "kvm_entry", "kvm_msr"})


def test_noise_goes_and_what_emulates_stays() -> None:
    lines = [
        "d kvm_exit: reason EPT_VIOLATION",
        "d kvm_entry: x, rip 0x1",
        "d kvm_exit: reason EPT_VIOLATION",
        ". kvm_msr: m",
    ]
    assert vmxcompare.normal(lines, EVENTS) == ["d kvm_exit: reason EPT_VIOLATION", ". kvm_msr: m"]
    stamps = [". kvm_msr: msr_write 6e0 = 0x123456", ". kvm_msr: msr_write 6e0 = 0x0"]
    assert vmxcompare.normal(stamps, EVENTS) == [
        ". kvm_msr: msr_write 6e0 = deadline",
        ". kvm_msr: msr_write 6e0 = 0x0",
    ]


def test_each_kind_of_difference_is_told() -> None:
    steps = [Step(1, "sti"), ipi(0, 1, 0xFD)]
    seen = done(steps)

    def told(**changed: Any) -> str:
        found = vmxcompare.differences(EVENTS, steps, seen, replace(seen, **changed))
        return found[0].what if found else "nothing"

    assert told() == "nothing"
    assert told(results=seen.results | {1: (1, 0, 0)}) == "step 1 (wrmsr on vCPU 0)"
    assert told(notes=[[], []]) == "interrupts of vCPU 1"
    assert told(lines=seen.lines | {"v0": seen.lines["v0"][1:]}) == "v0, line 0"
    assert told(pages=[bytes(1024), seen.pages[1]]) == "page of vCPU 0 at 0x30"
    assert told(calls=[1]) == "call 0"


def test_a_fault_of_bochs_is_told_by_its_line() -> None:
    def fault(reason: str, info: int) -> vmxcompare.Fault | None:
        text = f"kvm_exit: vcpu 1 reason {reason} rip 0x1 info1 0x1 info2 {info:#018x} intr"
        return vmxcompare.fault([vmxrun.Line("v1", "d..1.", 1, text)])

    failed = [vmxrun.Line("v1", ".....", 1, "kvm_userspace_exit: reason KVM_EXIT_FAIL_ENTRY (9)")]
    assert vmxcompare.fault(failed) == vmxcompare.Fault.ENTRY
    assert fault("EPT_VIOLATION", 0x8000_0000) == vmxcompare.Fault.VECTOR_0
    assert fault("EPT_VIOLATION", 0) is None
    assert fault("EXTERNAL_INTERRUPT", 0x8000_0000) is None


def test_self_ipis_that_bochs_does_not_store_are_told_from_others() -> None:
    steps = [Step(0, "wrmsr", (SELF_IPI, 0x41)), Step(0, "rdmsr", (SELF_IPI,))]
    page = vmxcompare.Difference("page of vCPU 0 at 0x3f0", "0x41", "0x0")
    read = vmxcompare.Difference("step 1 (rdmsr on vCPU 0)", "(0, 65, 0)", "(0, 0, 0)")
    assert vmxcompare.unstored(Setup(), steps, [page, read]) == [page, read]
    assert vmxcompare.unstored(Setup(apicv=False), steps, [page]) == []
    assert vmxcompare.unstored(Setup(), steps[1:], [page]) == []
    others = [
        replace(page, got="0x42"),
        replace(page, what="page of vCPU 1 at 0x3f0"),
        replace(page, what="v0, line 1"),
    ]
    assert vmxcompare.unstored(Setup(), steps, others) == []
    seen = done(steps)
    pages = [seen.pages[0][:0x3F0] + bytes(16), seen.pages[1]]
    (found,) = vmxcompare.differences(EVENTS, steps, seen, replace(seen, pages=pages))
    assert found == page


def test_loads_that_kvm_leaves_undone_are_not_compared() -> None:
    loads = [Step(0, "load", (offset, 0, length)) for offset, length in ((0x30, 4), (0x390, 4), (0xC0, 4), (0x32, 4))]
    assert [vmxcompare.left_alone(step) for step in loads] == [False, True, True, True]
    assert not vmxcompare.left_alone(Step(0, "rdmsr", (X2 + 0xC,)))


def test_ppr_is_what_kvm_stored_last() -> None:
    """6.1.192 without APICv: the CPU takes WRMSR of TPR, and KVM_GET_LAPIC has the PPR that KVM stored last."""
    for kernel in fx.profiles():
        seen = done([Step(1, "wrmsr", (X2 + 8, 0xDC))], Setup(apicv=False), kernel)
        assert (seen.pages[1][R.APIC_TASKPRI], seen.pages[1][R.APIC_PROCPRI]) == (0xDC, 0), kernel


def test_both_kinds_of_timers_are_drawn() -> None:
    kinds: set[Any] = set()
    for seed in range(40):
        rng = random.Random(seed)
        setup = vmxdraw.setup(rng, apicv=True, x2apic=True)
        steps, _ = vmxdraw.program(rng, setup, "6.12")
        kinds |= {step.kind if step.kind != "wrmsr" else step.args[0] for step in steps}
    assert {"deadline", "spend", X2 + (R.APIC_TMICT >> 4)} <= kinds
    assert vmxcompare.left_alone(Step(0, "rdmsr", (X2 + (R.APIC_TMCCT >> 4),)))


def drawn(kernel: str, seeds: int, **made: Any) -> list[tuple[Setup, list[Step]]]:
    """Programs."""
    found = []
    for seed in range(seeds):
        rng = random.Random(seed)
        setup = vmxdraw.setup(rng, **made)
        found.append((setup, vmxdraw.program(rng, setup, kernel)[0]))
    return found


@pytest.mark.parametrize(("trait", "release"), [("DEADLINE_READ_DISABLED", "6.12"), ("UNHALT_KEPT", "6.12")])
def test_drawn_programs_show_traits_that_take_several_steps(trait: str, release: str) -> None:
    """A deadline that is read with the APIC off; a kick, a run, a halt: a row without the rule does otherwise."""
    from fastexit.profile import PROFILES
    from fastexit.traits import Trait

    programs = drawn(release, 60, apicv=True, x2apic=True)

    def did() -> list[Any]:
        found: list[Any] = []
        for setup, steps in programs:
            try:
                seen = vmx.played(setup, steps, release).end()
            except ValueError:  # a vCPU of the wrong row sleeps when its step comes
                found.append(None)
                continue
            results = {n: vmxcompare.compared(step, seen.results.get(n)) for n, step in enumerate(steps)}
            found.append((results, seen.notes, seen.asleep))
        return found

    true, row = did(), PROFILES[fx.generation(release).name]
    try:
        PROFILES[row.name] = row._replace(traits=row.traits ^ Trait[trait], stable=(), later=())
        assert did() != true
    finally:
        PROFILES[row.name] = row


def test_of_a_deadline_only_whether_it_is_there_is_compared() -> None:
    steps = [Step(0, "rdmsr", (R.MSR_TSC_DEADLINE,)), Step(0, "vmcall", (R.HC_KICK_CPU, 0, 1, 0, 0))]
    seen = done(steps)

    def differ(*result: int, number: int = 0) -> bool:
        there = replace(seen, results=seen.results | {number: result})
        return bool(vmxcompare.differences(EVENTS, steps, seen, there))

    seen.results[0] = (0, 0x1234, 1)
    assert not differ(0, 0x777, 0)
    assert differ(0, 0, 0)
    assert differ(1, 0x1234, 1)
    assert differ(0, 1, 0, number=1), "what a hypercall gives is compared"


@pytest.mark.parametrize("x2apic", [True, False])
@pytest.mark.parametrize("apicv", [True, False])
def test_drawn_programs_can_be_done(apicv: bool, x2apic: bool) -> None:
    for seed in range(12):
        rng = random.Random(seed)
        setup = vmxdraw.setup(rng, apicv=apicv, x2apic=x2apic)
        kernel = ("5.10", "6.12", "7.3")[seed % 3]
        steps, player = vmxdraw.program(rng, setup, kernel)
        seen = player.end()
        again = vmx.played(setup, steps, kernel).end()
        assert (seen.notes, seen.results, seen.lines) == (again.notes, again.results, again.lines)
        asked = vmxrun.request(setup, steps, player.prepared, 3)
        assert len(bytes(vmxrun.finish(asked, setup, seen.asleep))) < vmxboot.MAILBOX_BYTES


# --------------------------------------------------------------------------------------------------------------- events


WITH_EVENTS = {"vcpus": 2, "apicv": False, "events": True}


def event(vcpu: int, dest: int, delivery: int, vector: int = 0) -> Step:
    return Step(vcpu, "wrmsr", (R.MSR_X2APIC_ICR, R.icr(dest, vector, delivery=delivery, level=True)))


def told(seen: Seen, vcpu: int, event: str = "kvm_exit") -> list[str]:
    """Reasons of a vCPU's exits."""
    lines = [line for line in seen.lines[f"v{vcpu}"] if line[2:].startswith(event)]
    return [line.partition("reason ")[2].split()[0] for line in lines]


def test_whom_an_init_kicks_scans_before_his_next_step() -> None:
    """The new APIC map of a vCPU that takes an INIT on its way in, of which no exit tells."""
    setup = Setup(vcpus=3, apicv=False, events=True, paged=True)
    init = R.icr(2, delivery=R.DM_INIT, level=True, trigger_level=True)
    player = vmx.played(setup, [Step(0, "wrmsr", (R.MSR_X2APIC_ICR, init))], "6.18")
    lines = player.end().lines["v0"]
    asked = [line for line in lines if "kvm_exit" in line and f"requests 0x{R.REQ_SCAN_IOAPIC:016x}" in line]
    assert [line.split("reason ")[1].split()[0] for line in asked] == ["EXTERNAL_INTERRUPT"]


def test_a_program_ends_where_nobody_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter([[0], [0], []])
    monkeypatch.setattr(vmxdraw, "_awake", lambda player: next(left))
    monkeypatch.setattr(vmxdraw, "_drawn", lambda *_: [Step(0, "sti")])
    steps, _ = vmxdraw.program(random.Random(1), Setup(), "6.18")
    assert len(steps) == 2


def test_an_nmi_gets_in_where_interrupts_are_off_and_the_next_asks_for_its_window() -> None:
    seen = done([Step(1, "host", ((1, "nmi"), (1, "nmi"), (1, "nmi")))], Setup(**WITH_EVENTS))
    assert seen.notes[1] == [(1, 2), (1, 2)], "two at most are kept"
    assert told(seen, 1) == ["IO_INSTRUCTION", "NMI_WINDOW", "IO_INSTRUCTION"]


def test_an_smi_is_over_when_its_handler_leaves_and_the_nmi_comes_then() -> None:
    seen = done([Step(1, "host", ((1, "nmi"), (1, "smi")))], Setup(**WITH_EVENTS))
    assert told(seen, 1) == ["IO_INSTRUCTION", "EXCEPTION_NMI", "NMI_WINDOW", "IO_INSTRUCTION"]
    assert seen.notes[1] == [(1, 2)]


def test_a_vcpu_begins_anew_and_goes_on_with_its_next_step() -> None:
    steps = [event(0, 1, R.DM_INIT), event(0, 1, R.DM_STARTUP, vmxcode.startup_vector(1))]
    steps += [Step(1, "wrmsr", (X2 + 0x0F, 0x1FF)), Step(1, "sti"), ipi(0, 1, 0x51)]
    seen = done(steps, Setup(**WITH_EVENTS))
    assert told(seen, 1)[:3] == ["EXTERNAL_INTERRUPT", "CR_ACCESS", "MSR_WRITE"]
    assert seen.notes[1] == [(4, 0x51)]
    waiting = vmx.played(Setup(**WITH_EVENTS), steps[:1], "6.12")
    assert waiting.waits == waiting.seen.asleep == [False, True]
    with pytest.raises(ValueError, match="sleeps"):
        done([steps[0], steps[3]], Setup(**WITH_EVENTS))
    with pytest.raises(ValueError, match="has no code where it begins"):
        done([steps[0], event(0, 1, R.DM_STARTUP, 0x99)], Setup(**WITH_EVENTS))
    with pytest.raises(ValueError, match="has no code where it begins"):
        done([event(1, 0, R.DM_INIT)], Setup(**WITH_EVENTS))
    with pytest.raises(ValueError, match="before it has passed the baton on"):
        done([event(1, 1, R.DM_INIT)], Setup(**WITH_EVENTS))


def test_vmx_operation_keeps_an_init_waiting() -> None:
    vmxed = [Step(1, "vmxon"), Step(1, "vmxon"), event(0, 1, R.DM_INIT), Step(1, "rdmsr", (X2 + 2,))]
    off = Step(1, "vmxoff", (1,))
    seen = done([*vmxed, off, Step(0, "rdmsr", (X2 + 2,))], Setup(**WITH_EVENTS, paged=True))
    assert (seen.results[0], seen.results[1], seen.results[3]) == ((0, 0, 0), (0, 1, 0), (0, 1, 0))
    assert told(seen, 1)[-1] == "VMOFF"
    assert seen.asleep == [False, True], "it waits for SIPI now"
    seen = done([Step(1, "vmxon"), Step(1, "vmxoff")], Setup(**WITH_EVENTS))
    assert seen.results == {0: (vmxcode.FAULTED_UD, 0, 0), 1: (vmxcode.FAULTED_UD, 0, 0)}, "without CR4.VMXE"


@pytest.mark.parametrize("x2apic", [True, False])
def test_programs_with_events_can_be_done(x2apic: bool) -> None:
    seen: set[str] = set()
    for number in range(9):
        kernel = ("5.10", "6.12", "7.3")[number % 3]
        mode = ("x2apic" if x2apic else "xapic") + " events"
        setup, steps, player = vmx.drawn_program(1, mode, number, kernel, apicv=number % 2 == 0)
        assert setup.mode == mode
        end = player.end()
        again = vmx.played(setup, steps, kernel).end()
        assert (end.notes, end.results, end.lines) == (again.notes, again.results, again.lines)
        asked = vmxrun.request(setup, steps, player.prepared, 3, end.notes)
        assert len(bytes(vmxrun.finish(asked, setup, end.asleep))) < vmxboot.MAILBOX_BYTES
        for i in range(setup.vcpus):
            seen |= set(told(end, i))
    assert seen >= {"NMI_WINDOW", "EXCEPTION_NMI", "CR_ACCESS", "VMON"}


def test_events_leave_the_plain_programs_as_they_were() -> None:
    def all_of(setup: Setup) -> list[tuple[int, str, Any]]:
        rng = random.Random("1/x2apic/0")
        vmxdraw.setup(rng, apicv=True, x2apic=True)
        return [(step.vcpu, step.kind, step.args) for step in vmxdraw.program(rng, setup, "6.12")[0]]

    setup, steps, _ = vmx.drawn_program(1, "x2apic", 0, "6.12", apicv=True)
    assert all_of(setup) == [(step.vcpu, step.kind, step.args) for step in steps]
    assert not any(step.kind.startswith("vmx") for step in steps)


def test_where_a_vcpu_goes_on_is_the_turn_behind_its_step() -> None:
    way = vmxcode.Way(restarts=True, count=10)
    code = vmxcode.program(1, [Step(1, "cli"), Step(0, "cli"), Step(1, "sti")], way)
    base = vmxcode.CODE_AT + vmxcode.CODE_BYTES
    marker = b"\xc7\x45" + bytes((vmxcode.RESTART,))
    places = [n for n in range(len(code)) if code[n : n + 3] == marker]
    targets = [struct.unpack_from("<I", code, n + 3)[0] - base for n in places]
    assert len(targets) == 3
    for target, number in zip(targets, (0, 2, 3), strict=True):
        assert code[target:].startswith(vmxcode.wait_for(number))


def test_what_a_kernel_did_is_read_as_the_model_tells_it() -> None:
    steps = [Step(1, "sti"), Step(0, "rdmsr", (X2 + 2,))]
    area = bytearray(vmxcode.AREA_BYTES)
    first = [struct.pack("<I", vmxcode.area(i) + vmxcode.NOTES) for i in range(2)]
    areas = [bytearray(area), bytearray(area)]
    for i in range(2):
        areas[i][:4] = first[i]
    struct.pack_into("<III", areas[0], vmxcode.RESULTS + 16, 7, 9, 0)
    struct.pack_into("<I", areas[1], 0, vmxcode.area(1) + vmxcode.NOTES + 4)
    struct.pack_into("<I", areas[1], vmxcode.NOTES, 5 << 8 | 0xFD)
    answer = W.Answer(
        ioctls=[(1, b"")] * 4 + [(0, b"page0"), (0, b"page1")],
        reads=[bytes(some) for some in areas],
        files=[["  v0-71      [001] d..1. 12345: kvm_entry: vcpu 0, rip 0x1"]],
    )
    seen, raw = vmxrun.seen(Setup(), steps, answer)
    assert seen.results == {0: (0, 0, 0), 1: (0, 7, 9)}
    assert seen.notes == [[], [(5, 0xFD)]]
    assert seen.lines["v0"] == ["d kvm_entry: vcpu 0, rip 0x1"]
    assert seen.pages == [b"page0", b"page1"]
    assert raw[0].stamp == 12345


def test_a_violation_is_compared_by_its_access_alone() -> None:
    line = "d kvm_exit: vcpu 0 reason EPT_VIOLATION rip 0x1f info1 0x{} info2 0x0000000000000000"
    wanted = frozenset({"kvm_exit"})
    for bits, same in (("0000000000000182", True), ("0000000000000782", True), ("0000000000000181", False)):
        told = [line.format(bits), ". kvm_apic: apic_write"]
        assert (vmxcompare.normal(told, wanted) == vmxcompare.normal([line.format("182")], wanted)) is same


def test_a_thread_without_a_name_is_known_by_what_it_does() -> None:
    text = """
           <...>-71      [001] d..1. 10: kvm_exit: vcpu 0 reason HLT rip 0x1 info1 0x0
           <...>-71      [001] d..1. 11: kvm_entry: vcpu 0, rip 0x1
            init-72      [002] d..1. 12: kvm_entry: vcpu 1, rip 0x1
           <...>-70      [000] ..... 13: kvm_msi_set_irq: dst 1 vec 243 (Fixed|physical|edge)
    """
    lines = vmxrun.parsed(text.splitlines())
    assert [(line.thread, line.stamp) for line in lines] == [("v0", 10), ("v0", 11), ("v1", 12), ("host", 13)]


def test_a_waiting_vcpu_sees_its_turn_and_the_end() -> None:
    code = vmxcode.wait_for(5)
    mine, over = code.index(struct.pack("<I", 5)) + 4, code.index(b"\x83\x3d")
    assert code[mine] == 0x74
    assert mine + 2 + code[mine + 1] == len(code)
    assert struct.unpack_from("<b", code, over + 8)[0] == -(over + 9)


def test_a_program_that_is_over_leaves_the_guest_each_time_it_is_let_run() -> None:
    for code in (vmxcode.wait_for(5), vmxcode.program(0, [Step(0, "host", (-1, "get_msr", 1))], vmxcode.Way())):
        jump = code.rindex(b"\xeb", 0, -1)
        target = jump + 2 + struct.unpack_from("<b", code, jump + 1)[0]
        assert code[target : target + 2] == vmxcode.out(vmxcode.PORT_DONE)


def test_programs_of_too_many_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="fewer steps"):
        vmxcode.program(0, [Step(0, "rdmsr", (X2 + 2,))] * 500, vmxcode.Way(count=100))


def test_who_comes_next_waits_as_long_as_a_sleeper_takes_interrupts() -> None:
    vectors = (0x44, 0x62, 0x7F)
    for count in range(4):
        steps = [ipi(0, 0, vector) for vector in vectors[:count]] + [Step(0, "halt"), ipi(1, 0, 0x31)]
        player = vmx.played(Setup(apicv=False), steps, "7.3")
        seen = player.end()
        taken = [number for number, _ in seen.notes[0]]
        assert taken == [count + 1] * (count + 1), "all of them before the step of the other, which adds one"
        asked = bytes(vmxrun.request(Setup(apicv=False), steps, player.prepared, 3, seen.notes))
        loop = vmxcode.settle(vmxrun.SETTLE * max(1, count + 1))
        assert vmxcode.wait_for(count + 1) + loop in asked


# --------------------------------------------------------------------------------------------------------- path lengths


class Pretender:
    """A machine whose guests always took the same."""

    def ask(self, request: bytes, seconds: float = 0) -> list[str]:
        sample = struct.pack("<II", 2000 + paths.OVERHEAD, 900 + paths.OVERHEAD) * paths.REPETITIONS
        return ["@read 0 " + sample.hex()]


def test_lengths_are_those_of_the_samples() -> None:
    for one in paths.measure(Pretender()):
        assert (one.exit, one.exit_least) == (2000, 2000)
        assert one.to_receiver == (None if one.receiver == "none" else 900)


def test_a_guest_that_does_not_come_back_is_told() -> None:
    class Stuck:
        def ask(self, request: bytes, seconds: float = 0) -> list[str]:
            return ["@stuck vCPU 0"]

    with pytest.raises(ChildProcessError, match="did not come back"):
        paths.samples(Stuck(), paths.paths()[0])


# -------------------------------------------------------------------------------------------------------------- the lab


class Counted:
    """A machine that is none: what it was made with, what it was asked, whether it was closed."""

    def __init__(self, kernel: kernels.Kernel, *_: Any, parameters: dict[str, str], **__: Any) -> None:
        self.parameters = parameters
        self.closed = 0

    def ask(self, request: bytes, seconds: float = 0) -> list[str]:
        if b"/sys/module" in request:
            lines = []
            for name in ("vector_hashing", "min_timer_period_us", "pi_inject_timer", "ignore_msrs", "enable_apicv"):
                value = {"enable_apicv": "Y", "vector_hashing": "N"}.get(name)
                lines += ["@file", *([value] if value else []), "@end"]
            return lines
        cpuid = struct.pack("<II", 1, 0) + struct.pack("<IIIIIII12x", 0x8000_0008, 0, 0, 0x3027, 0, 0, 0)
        page = bytearray(1024)
        page[R.APIC_ICR + 4 : R.APIC_ICR + 8] = b"\xf0\xff\xff\x7f"
        has = [f"@ioctl {value}" + " " for value in (1, 0x1F, 0, 1024, 4096, 3)]
        data = [struct.pack("<Q", 0x400), cpuid, b"", b"", bytes(page)]
        return has + [f"@ioctl 1 {some.hex()}" for some in data]

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> kernels.Kernel:
    kernel = kernels.Kernel("6.1.192", "6.1.0-57-cloud-amd64", tmp_path / "vmlinuz", tmp_path)
    monkeypatch.setattr(kernels, "find", lambda version: kernel)
    monkeypatch.setattr(vmx, "Machine", Counted)
    return kernel


@pytest.mark.parametrize("apicv", [None, True, False])
def test_a_lab_with_vendor_vmx_is_the_vmx_lab(counted: kernels.Kernel, apicv: bool | None) -> None:
    with fx.kvm.Lab("6.1", vendor="vmx", apicv=apicv) as lab:
        assert isinstance(lab, fx.kvm.VmxLab)
        assert lab.kernel == counted
        assert (lab.vendor, lab.version, lab.apicv) == ("vmx", "6.1", apicv is not False)
        assert lab.machine.parameters["kvm-intel"] == ("enable_apicv=0 flexpriority=0" if apicv is False else "")
    lab.close()
    assert lab.machine.closed == 2


def test_its_host_is_what_the_kernel_says(counted: kernels.Kernel) -> None:
    host = fx.kvm.Lab("6.1", vendor="vmx").host
    assert (host.module, host.kernel, host.version) == ("kvm_intel", "6.1", "6.1.192")
    assert (host.apicv, host.vector_hashing, host.min_timer_period_us) == (True, False, 200)
    assert (host.icr_split, host.cmci, host.maxphyaddr, host.max_vcpu_id) == (False, True, 0x27, 4096)
    assert host.keywords()["vendor"] == "vmx"
    fx.Machine(2, **host.keywords())


def test_a_machine_that_stops_is_booted_again(counted: kernels.Kernel, monkeypatch: Any) -> None:
    """What a program did before is nobody's word for what it does: it is run again, and told where it never ends."""
    made: list[Counted] = []

    class Stops(Counted):
        def ask(self, request: bytes, seconds: float = 0) -> list[str]:
            made.append(self)
            raise KvmUnavailable(0, "the lab's machine does not answer")

    monkeypatch.setattr(vmx, "Machine", Stops)
    with vmx.VmxLab("6.12") as lab:
        report = lab.verify(3, shorten=0)
    assert report.restarted == vmx.TRIES == len(set(map(id, made)))
    assert all(machine.closed for machine in made)
    assert not report.agreed
    assert "does not answer" in report.as_dict()["differences"][0]


@pytest.fixture
def agreeing(counted: kernels.Kernel, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A lab whose kernel does what the model does, but for the number of a program; what was run, in order."""
    told: dict[str, Any] = {"run": [], "differs": None, "once": None, "left": ()}

    def tried(lab: Any, setup: Setup, steps: Any, player: Any) -> Any:
        told["run"].append((setup, steps))
        number = len({id(steps) for _, steps in told["run"]}) - 1
        known = vmxcompare.Fault.VECTOR_0 if number in told["left"] else None
        differs = number == told["differs"] or known is not None or len(told["run"]) - 1 == told["once"]
        return [vmxcompare.Difference("a vCPU", "1", "2")] * differs, known, 7

    monkeypatch.setattr(vmx.VmxLab, "_tried", tried)
    return told


def test_a_run_that_was_ended_goes_on(agreeing: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    kept = tmp_path / "kept.json"
    command = ["verify", "--kernel", "6.1", "--vendor", "vmx", "--keep", str(kept), "--json", "--ops"]
    assert cli.main([*command, "4"]) == 0
    first = [repr(one) for one in agreeing["run"]]
    assert cli.main([*command, "10"]) == 0
    whole = [repr(one) for one in agreeing["run"]]
    report = json.loads(kept.read_text())
    drawn = {"x2apic": 3, "xapic": 3, "x2apic events": 2, "xapic events": 2}
    assert report["programs"] == report["drawn"] == drawn
    assert (len(first), report["trace_lines"], report["agreed"]) == (4, 70, True)
    agreeing["run"].clear()
    kept.unlink()
    assert cli.main([*command, "10"]) == 0
    assert [repr(one) for one in agreeing["run"]] == whole, "the same programs in one run"
    agreeing["run"].clear()
    assert cli.main([*command, "10", "--seed", "2"]) == 0, "another seed's report is no beginning"
    assert len(agreeing["run"]) == 10
    capsys.readouterr()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"differences": ["one"]}'])
def test_a_kept_file_of_something_else_is_begun_anew(agreeing: dict[str, Any], tmp_path: Path, text: str) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text(text)
    assert cli.main(["verify", "--kernel", "6.1", "--vendor", "vmx", "--keep", str(kept), "--json", "--ops", "2"]) == 0
    assert json.loads(kept.read_text())["programs"] == {"x2apic": 1, "xapic": 1}


def test_a_report_that_cannot_be_kept_is_one_line(counted: kernels.Kernel, tmp_path: Path, capsys: Any) -> None:
    for name in (tmp_path, tmp_path / "none" / "kept.json"):
        assert cli.main(["verify", "--kernel", "6.1", "--vendor", "vmx", "--keep", str(name)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "--keep" in line


def test_all_modes_get_as_many_though_some_are_left_out(agreeing: dict[str, Any]) -> None:
    agreeing["left"] = (0, 2)
    with vmx.VmxLab("6.1") as lab:
        report = lab.verify(8)
        plain = lab.verify(4, only="plain")
    assert report.programs == {"x2apic": 2, "xapic": 2, "x2apic events": 2, "xapic events": 2}
    assert (sum(report.drawn.values()), report.left_out) == (10, 2)
    assert plain.programs == {"x2apic": 2, "xapic": 2}
    agreeing["left"] = tuple(range(10_000))
    with vmx.VmxLab("6.1") as lab:
        assert not lab.verify(6).agreed, "nothing was compared"


def test_what_differs_once_is_told(agreeing: dict[str, Any]) -> None:
    agreeing["once"] = 2
    with vmx.VmxLab("6.1") as lab:
        report = lab.verify(4, only="plain")
    assert (report.repeated, report.agreed) == (1, True)
    assert report.as_dict()["once"] == ["x2apic 1: a vCPU: expected 1, KVM has 2"]


def test_a_difference_ends_it_or_so_many(agreeing: dict[str, Any]) -> None:
    agreeing["differs"] = 3
    with vmx.VmxLab("6.1") as lab:
        report = lab.verify(20, shorten=0)
    assert (report.compared, len(report.stories), report.agreed) == (3, 1, False)
    agreeing["run"].clear()
    with vmx.VmxLab("6.1") as lab:
        report = lab.verify(20, shorten=0, differing=2)
    assert (report.compared, len(report.stories)) == (20, 1)


@pytest.mark.parametrize("name", ["oracle", "trace", "judge"])
def test_it_has_no_oracle_and_says_what_it_has(counted: kernels.Kernel, name: str) -> None:
    with pytest.raises(ValueError, match=r"verify\(\) or run\(\)") as refused:
        getattr(fx.kvm.Lab("6.1", vendor="vmx"), name)()
    assert len(str(refused.value).splitlines()) == 1


def test_an_unknown_vendor_and_avic_are_refused(counted: kernels.Kernel) -> None:
    with pytest.raises(ValueError, match="unknown vendor 'arm': one of svm, vmx"):
        fx.kvm.Lab("6.1", vendor="arm")
    with pytest.raises(ValueError, match="AVIC"):
        fx.kvm.Lab("6.1", apicv=True)
    with pytest.raises(ValueError, match="either a version or an image"):
        fx.kvm.Lab(vendor="vmx")


# -------------------------------------------------------------------------------------------------------------- kernels


@pytest.mark.long
def test_a_one_shot_that_is_over_ticks_at_each_wake_up_of_5_10() -> None:
    """vmx_post_block: the kernel itself says so."""
    try:
        lab = vmx.VmxLab("5.10", apicv=False)
    except OSError as missing:
        pytest.skip(str(missing))
    setup = Setup(2, apicv=False)
    timer = [(R.APIC_LVTT, 0xEC), (R.APIC_TDCR, vmxdraw.BY_ONE), (R.APIC_TMICT, 8_000_000)]
    steps = [Step(0, "sti"), *(Step(0, "wrmsr", (X2 + (offset >> 4), value)) for offset, value in timer)]
    steps += [Step(1, "spend", (vmxdraw.SPENT,))]
    for vector in (0x41, 0x51):
        steps += [Step(0, "halt"), Step(1, "wrmsr", (R.MSR_X2APIC_ICR, R.icr(0, vector)))]
    assert [vector for _, vector in vmx.played(setup, steps, "5.10").seen.notes[0]] == [0xEC, 0xEC, 0x41, 0xEC, 0x51]
    with lab:
        assert lab.run(setup, steps) == []


@pytest.mark.long
@pytest.mark.parametrize("version", ["6.1"])
def test_interrupts_off_keep_the_guests_out_and_the_hosts_in(version: str) -> None:
    """Two of mends.py: a host's tick delivers nothing, and who waits for every processor of the VM gets on."""
    try:
        lab = vmx.VmxLab(version)
    except OSError as missing:
        pytest.skip(str(missing))
    steps = [Step(1, "store", (R.APIC_ICR, 0x41, 4)), Step(0, "store", (R.APIC_LDR, 0, 4))]
    steps += [Step(0, "spend", (vmxdraw.SPENT,)), Step(0, "sti")]
    assert vmx.played(Setup(x2apic=False), steps, version).seen.notes == [[(3, 0x41)], []]
    with lab:
        for _ in range(5):
            assert lab.run(Setup(x2apic=False), steps) == []


@pytest.mark.long
@pytest.mark.parametrize("version", ["6.12"])
def test_a_kernel_agrees(version: str) -> None:
    try:
        lab = vmx.VmxLab(version)
    except OSError as missing:
        pytest.skip(str(missing))
    with lab:
        assert lab.parameters()["enable_apicv"] == "Y"
        assert lab.host.apicv
        assert lab.host.keywords()["vendor"] == "vmx"
        report = lab.verify(30, seed=7)
    assert report.agreed, report.stories[0].text() if report.stories else report
    assert fx.generation(lab.kernel.version).name == version
