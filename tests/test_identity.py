"""Who is who in a trace: VMs and vCPUs, and what lines say of host and guest."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastexit.answers.ask import Ask, of_recording
from fastexit.answers.census import vendor_of
from fastexit.answers.identity import Identity, identify
from fastexit.answers.places import Places
from fastexit.records import read
from fastexit.records.columns import Recording

Who = dict[str, tuple[int, int]]


class Recorder:
    """Writes a trace; ``who`` begins a line, its time is its number."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[str] = []

    def line(self, who: str, event: str, context: str = "d..1.") -> None:
        now = len(self._lines) + 1
        self._lines.append(f" {who} [001] {context} {now}.000000: {event}\n")

    def lines(self, who: str, *events: str) -> None:
        for event in events:
            self.line(who, event)

    def read(self) -> Recording:
        self._path.write_text("".join(self._lines))
        return read(self._path)


@pytest.fixture
def trace(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path / "trace")


def who(recording: Recording, found: Identity) -> Who:
    """Thread -> VM, vCPU."""
    pairs = zip(found.where.vm.tolist(), found.where.vcpu.tolist())
    return {f"{t.comm}-{t.pid}": pair for t, pair in zip(recording.threads, pairs)}


def values(found: Identity, vm: int = 1) -> dict[str, str]:
    return {key: clue.value for key, clue in found.clues[vm].items()}


# ------------------------------------------------------------------------------------------------------- VMs and vCPUs


def test_vcpus_by_what_their_lines_name(trace: Recorder) -> None:
    trace.line("qemu-101", "kvm_entry: vcpu 1")
    trace.line("qemu-100", "kvm_exit: vcpu 0 reason HLT rip 0x1 info 0 0")
    trace.line("qemu-102", "kvm_eoi: apicid a vector 33")
    recording = trace.read()
    found = identify(recording)
    assert who(recording, found) == {"qemu-101": (1, 1), "qemu-100": (1, 0), "qemu-102": (1, 10)}
    assert found.notes == []


def test_what_lines_name_wins_over_names(trace: Recorder) -> None:
    """QEMU counts its threads, KVM's vcpu_id is the APIC id; they differ with three cores a socket."""
    trace.line("CPU 3/KVM-103", "kvm_entry: vcpu 4")
    recording = trace.read()
    assert who(recording, identify(recording)) == {"CPU 3/KVM-103": (1, 4)}


def test_vcpus_by_names_alone(trace: Recorder) -> None:
    trace.line("CPU 2/KVM-1821755", "kvm_msr: msr_write 830 = 0x2000000fd")
    recording = trace.read()
    assert who(recording, identify(recording)) == {"CPU 2/KVM-1821755": (1, 2)}


def test_vms_by_process(trace: Recorder) -> None:
    for pid, tgid, vcpu in ((11, 10, 0), (21, 20, 0), (12, 10, 1), (22, 20, 1)):
        trace.line(f"qemu-{pid} (     {tgid})", f"kvm_entry: vcpu {vcpu}")
    trace.line("qemu-10 (     10)", "kvm_set_irq: gsi 4 level 1 source 0")
    trace.line("vhost-20-25 (     25)", "kvm_apic_accept_irq: apicid 0 vec 35 (Fixed|edge)")
    trace.line("kworker/0:1-7 (     7)", "kvm_apic_accept_irq: apicid 0 vec 35 (Fixed|edge)")
    recording = trace.read()
    found = identify(recording)
    assert who(recording, found) == {
        **{"qemu-11": (1, 0), "qemu-12": (1, 1), "qemu-21": (2, 0), "qemu-22": (2, 1)},
        **{"qemu-10": (1, -1), "vhost-20-25": (2, -1), "kworker/0:1-7": (0, -1)},
    }
    assert list(found.clues) == [0, 1, 2]


def test_vms_one_after_the_other(trace: Recorder) -> None:
    for pid, vcpu in ((11, 0), (12, 1), (13, 0), (14, 1)):
        trace.line(f"CPU {vcpu}/KVM-{pid}", f"kvm_entry: vcpu {vcpu}")
    recording = trace.read()
    found = identify(recording)
    assert [pair for pair in who(recording, found).values()] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert found.notes == []


def test_vms_started_at_once_by_who_answers_whom(trace: Recorder) -> None:
    for pid, vcpu in ((11, 0), (12, 0), (13, 1), (14, 1)):
        trace.line(f"qemu-{pid}", f"kvm_entry: vcpu {vcpu}")
    for sender, target, vector in ((11, 14, 40), (12, 13, 41), (14, 11, 42), (13, 12, 43)):
        apic_id = int(target > 12)
        trace.line(f"qemu-{sender}", f"kvm_apic_accept_irq: apicid {apic_id} vec {vector} (Fixed|edge)")
        trace.line(f"qemu-{target}", f"kvm_eoi: apicid {apic_id} vector {vector}")
    recording = trace.read()
    found = identify(recording)
    assert who(recording, found) == {"qemu-11": (1, 0), "qemu-14": (1, 1), "qemu-12": (2, 0), "qemu-13": (2, 1)}
    assert found.notes == []


def test_vms_that_nothing_tells_apart_are_said_and_refuse_nobody(trace: Recorder) -> None:
    for pid, vcpu in ((11, 0), (12, 0), (13, 1), (14, 1)):
        trace.line(f"qemu-{pid}", f"kvm_entry: vcpu {vcpu}")
    trace.line("fc_vcpu 0-500", "kvm_entry: vcpu 0")
    recording = trace.read()
    found = identify(recording)
    assert who(recording, found) == {
        **{"qemu-11": (1, 0), "qemu-13": (1, 1), "qemu-12": (2, 0), "qemu-14": (2, 1)},
        **{"fc_vcpu 0-500": (3, 0)},
    }
    (note,) = found.notes
    assert "record-tgid" in note
    assert "qemu-11" in note


def test_a_thread_that_acts_for_several_vcpus(trace: Recorder) -> None:
    trace.lines("vmm-9", *["kvm_entry: vcpu 0"] * 3, *["kvm_entry: vcpu 1"] * 2)
    recording = trace.read()
    found = identify(recording)
    assert who(recording, found) == {"vmm-9": (1, 0)}
    assert "several vCPUs" in found.notes[0]


def test_a_few_damaged_lines_do_not_change_who_a_thread_is(trace: Recorder) -> None:
    trace.lines("vmm-9", *["kvm_entry: vcpu 0"] * 20, "kvm_entry: vcpu 1")
    recording = trace.read()
    found = identify(recording)
    assert (who(recording, found), found.notes) == ({"vmm-9": (1, 0)}, [])


def test_threads_that_nothing_names_by_their_order(trace: Recorder) -> None:
    for pid in (12, 10, 11):
        trace.line(f"vmm-{pid}", "kvm_msr: msr_write 830 = 0xfd")
    recording = trace.read()
    found = identify(recording)
    assert who(recording, found) == {"vmm-12": (1, 2), "vmm-10": (1, 0), "vmm-11": (1, 1)}
    assert "order of thread ids" in found.notes[0]


def test_threads_whose_names_were_forgotten_join_the_others(trace: Recorder) -> None:
    trace.line("CPU 0/KVM-100", "kvm_entry: vcpu 0")
    trace.line("<...>-101", "kvm_entry: vcpu 1")
    recording = trace.read()
    assert who(recording, identify(recording)) == {"CPU 0/KVM-100": (1, 0), "<...>-101": (1, 1)}


def test_a_trace_without_vcpus_is_one_vm(trace: Recorder) -> None:
    trace.line("<...>-7", "kvm_set_irq: gsi 0 level 1 source 0", context="....")
    trace.line("<...>-7", "kvm_apic_accept_irq: apicid 0 vec 209 (Fixed|edge)", context="....")
    recording = trace.read()
    found = identify(recording)
    assert who(recording, found) == {"<...>-7": (1, -1)}
    assert "taken for one VM" in found.notes[0]
    assert list(found.clues) == [1]


def test_the_hosts_threads_belong_to_the_only_vm(trace: Recorder) -> None:
    trace.line("CPU 0/KVM-100", "kvm_entry: vcpu 0")
    trace.line("kworker/0:1-7", "kvm_apic_accept_irq: apicid 0 vec 35 (Fixed|edge)")
    recording = trace.read()
    assert who(recording, identify(recording))["kworker/0:1-7"] == (1, -1)


def test_handlers_of_the_host_belong_to_no_vm_where_there_are_several(trace: Recorder) -> None:
    for pid in (11, 12):
        trace.line(f"CPU 0/KVM-{pid}", "kvm_entry: vcpu 0")
    trace.line("CPU 0/KVM-11", "kvm_apic_accept_irq: apicid 0 vec 35 (Fixed|edge)", context="d.h1.")
    trace.line("CPU 0/KVM-11", "kvm_apic_accept_irq: apicid 0 vec 36 (Fixed|edge)")
    recording = trace.read()
    places = Places(identify(recording).where)
    (rows,) = recording.blocks
    assert [places.vms[i] for i in places.vm_of(places.threads_of(rows))] == [1, 2, 0, 1]


def test_a_report_says_what_was_assumed(trace: Recorder) -> None:
    trace.line("vmm-10", "kvm_msr: msr_write 830 = 0xfd")
    (file,) = of_recording(trace.read(), Ask(kernels=())).files
    assert any("order of thread ids" in note for note in file.notes)


def test_names_in_notes_are_harmless(trace: Recorder) -> None:
    trace.line("\x1b[31mred-10", "kvm_msr: msr_write 830 = 0xfd")
    trace.line("\x1b[31mred-11", "kvm_msr: msr_write 830 = 0xfd")
    (note,) = identify(trace.read()).notes
    assert note.isprintable()


def test_an_empty_recording() -> None:
    found = identify(Recording("-", []))
    assert (found.clues, found.notes) == ({}, [])


# --------------------------------------------------------------------------------------------------------------- clues

EXIT = "kvm_exit: vcpu 0 reason {} rip 0x{:x} info1 0x0 info2 0x0 intr_info 0x00000000 error_code 0x00000000"


@pytest.mark.parametrize(
    ("reason", "vendor"),
    [
        *(("MSR_WRITE", "vmx"), ("PREEMPTION_TIMER", "vmx"), ("EPT_VIOLATION FAILED_VMENTRY", "vmx")),
        *(("apic_access", "vmx"), ("io_instruction", "vmx"), ("msr", "svm"), ("vintr", "svm"), ("npf", "svm")),
        *(("EXIT_MSR", "svm"), ("EXIT_EXCP_GP", "svm"), ("hlt", ""), ("cpuid", ""), ("0x7f", ""), ("PF excp", "svm")),
    ],
)
def test_vendors_by_exit_reasons(reason: str, vendor: str) -> None:
    assert vendor_of(reason) == vendor


def test_an_svm_host_of_today(trace: Recorder) -> None:
    trace.lines(
        "vmexit-4242",
        "kvm_apic_ipi: dst b0 vec 176 (Fixed|physical|assert|edge|self)",
        "kvm_apic_accept_irq: apicid 0 vec 176 (Fixed|edge)",
        "kvm_apic: apic_write APIC_ICR = 0xb0000440b0",
        "kvm_msr: msr_write 830 = 0xb0000440b0",
        "kvm_entry: vcpu 0, rip 0x406a89",
        EXIT.format("vintr", 0x4004AE),
        "kvm_inj_virq: IRQ 0xb0",
    )
    found = identify(trace.read())
    assert values(found) == {
        **{"vendor": "svm", "generation": "6.1 to 6.12", "apicv": "off", "ipiv": "off", "apic_mode": "x2APIC"},
    }
    clues = found.clues[1]
    assert [clues[key].line for key in ("vendor", "apicv", "apic_mode")] == [6, 7, 4]
    assert "all 64 bits of an x2APIC ICR (line 3)" in clues["generation"].evidence
    assert {clue.source for clue in clues.values()} == {"trace"}


def test_a_windows_guest_with_apicv_and_a_guest_of_its_own(trace: Recorder) -> None:
    trace.lines(
        "CPU 0/KVM-699876",
        "kvm_apicv_accept_irq: apicid 0 vec 129 (Fixed|level)",
        "kvm_ioapic_set_irq: pin 19 dst 0 vec 129 (Fixed|physical|level)",
        "kvm_entry: vcpu 0, rip 0xfffff8489b64142c",
        "kvm_exit: vcpu 0 reason VMRESUME rip 0xfffff8489b641308 info1 0x0",
        "kvm_hv_timer_state: vcpu_id 0 hv_timer 1",
        "kvm_msr: msr_read 40000020 = 0x1",
        "kvm_pv_eoi: apicid 0 vector 65",
    )
    assert values(identify(trace.read())) == {
        **{"vendor": "vmx", "generation": "6.1 to 6.12", "apicv": "on", "irqchip": "full", "nested": "yes"},
        **{"hv_timer": "on", "guest": "Windows", "hyperv": "yes", "pv_eoi": "yes"},
    }


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([EXIT.format("APIC_WRITE", 1)], {"apicv": "on"}),
        ([EXIT.format("EOI_INDUCED", 1)], {"apicv": "on"}),
        ([EXIT.format("avic_incomplete_ipi", 1)], {"apicv": "on", "vendor": "svm"}),
        (["kvm_avic_incomplete_ipi: vcpu=0, icrh:icrl=0x00000001:000000fd, id=1, index=0"], {"apicv": "on"}),
        (
            ["kvm_pi_irte_update: PI is enabled and being updated for irq 3, vcpu 0, gsi: 0x18, gvec: 0x22"],
            {"apicv": "on"},
        ),
        (["kvm_msr: msr_write 80b = 0x0"], {"apicv": "off", "ipiv": "off", "apic_mode": "x2APIC"}),
        (["kvm_mmio: mmio write len 4 gpa 0xfee000b0 val 0x0"], {"apicv": "off", "ipiv": "off", "apic_mode": "xAPIC"}),
        (
            [EXIT.format("APIC_WRITE", 1), "kvm_msr: msr_write 830 = 0x1000000fd"],
            {"apicv": "on", "ipiv": "off", "apic_mode": "x2APIC"},
        ),
        ([EXIT.format("APIC_WRITE", 1), "kvm_msr: msr_write 830 = 0xc08fb"], {"apicv": "on", "apic_mode": "x2APIC"}),
        (
            [
                "kvm_apicv_accept_irq: apicid 0 vec 129 (Fixed|level)",
                "kvm_apicv_inhibit_changed: set reason=1, inhibits=0x2 HYPERV",
                "kvm_inj_virq: IRQ 0x81",
            ],
            {"apicv": "at times", "inhibits": "HYPERV"},
        ),
        (["kvm_apicv_inhibit_changed: cleared reason=1, inhibits=0x0"], {}),
        (["kvm_userspace_exit: reason KVM_EXIT_IOAPIC_EOI (26)"], {"irqchip": "split"}),
        (["kvm_apic: apic_read APIC_LVR = 0x1050014"], {"irqchip": "split"}),
        (["kvm_apic: apic_read APIC_LVR = 0x50014"], {}),
        (["kvm_pic_set_irq: chip 0 pin 4 (edge|masked)"], {"irqchip": "full"}),
        (["kvm_userspace_exit: reason KVM_EXIT_IRQ_WINDOW_OPEN (7)"], {"irqchip": "none"}),
        (["kvm_hv_timer_state: vcpu_id 0 hv_timer 0"], {"hv_timer": "off"}),
        (
            ["kvm_hv_timer_state: vcpu_id 0 hv_timer 0", EXIT.format("PREEMPTION_TIMER", 1)],
            {"hv_timer": "on", "vendor": "vmx"},
        ),
        ([EXIT.format("HLT", 0xFFFFFFFF81000000)], {"guest": "Linux"}),
        ([EXIT.format("HLT", 0x7FFF00000000)], {}),
        (["kvm_msr: msr_write 4b564d04 = 0x1"], {"guest": "Linux"}),
        (["kvm_msr: msr_write 40000071 = 0xfd"], {"hyperv": "yes"}),
        (["kvm_msr: msr_write 40000071 = 0xfd (#GP)"], {}),
        (["kvm_nested_vmexit: rip: 0x1 reason: CPUID ext_inf1: 0x0"], {"nested": "yes"}),
        (["kvm_nested_intercepts: cr_read: 0010 cr_write: 0010 excp: 00060042 intercepts: 0"], {"nested": "yes"}),
        (["kvm_msr: msr_read 1b = 0xfee00900"], {}),
        (
            ["kvm_mmio: mmio read len 4 gpa 0xfee00020 val 0x0", "kvm_msr: msr_read 802 = 0x0"],
            {"apic_mode": "xAPIC, then x2APIC"},
        ),
    ],
)
def test_clues(trace: Recorder, events: list[str], expected: dict[str, str]) -> None:
    trace.lines("CPU 0/KVM-5", *events)
    found = values(identify(trace.read()))
    for key in {"vendor", "generation"} - expected.keys():
        found.pop(key, None)
    assert found == expected


@pytest.mark.parametrize(
    ("events", "context", "generation"),
    [
        (["kvm_entry: vcpu 0"], "d..1", "seed-v3 to 5.8"),
        (["kvm_entry: vcpu 0, rip 0x1"], "d..1.", "5.10 to 6.12"),
        (["kvm_entry: vcpu 0, rip 0x1 intr_info 0x00000000 error_code 0x00000000"], "d..1.", "6.12 to 7.3"),
        (["kvm_inj_virq: irq 52"], "d..1", "seed-v3 to 5.10"),
        (["kvm_avic_doorbell: vcpuid=1, apicid=1"], "d..1.", "6.1 to 7.3"),
        (["kvm_entry: vcpu 0, rip 0x1", "kvm_exit: reason HLT rip 0x1 info 0 0"], "d..1.", "5.10 to 6.12"),
        (["kvm_entry: vcpu 0", "kvm_inj_virq: IRQ 0x41"], "d..1.", "unknown"),
    ],
)
def test_generations_by_texts(trace: Recorder, events: list[str], context: str, generation: str) -> None:
    for event in events:
        trace.line("CPU 0/KVM-5", event, context)
    assert values(identify(trace.read()))["generation"] == generation


def test_the_order_of_an_icr_writes_lines_dates_too(trace: Recorder) -> None:
    trace.lines(
        "CPU 0/KVM-5",
        "kvm_apic_accept_irq: apicid 1 vec 253 (Fixed|edge)",
        "kvm_apic_ipi: dst 1 vec 253 (Fixed|physical|de-assert|edge|dst)",
        "kvm_apic: apic_write APIC_ICR = 0x1000000fd",
        "kvm_msr: msr_write 830 = 0x1000000fd",
    )
    clue = identify(trace.read()).clues[1]["generation"]
    assert clue.value == "6.18 to 7.3"
    assert "before its kvm_apic_ipi" in clue.evidence


def test_evidence_is_the_first_line_of_any_event_that_shows_it(trace: Recorder) -> None:
    trace.lines("CPU 0/KVM-5", "kvm_entry: vcpu 0, rip 0xfffff80012345678", EXIT.format("HLT", 0xFFFFF80012345678))
    trace.lines(
        "CPU 0/KVM-5",
        "kvm_pic_set_irq: chip 0 pin 1 (edge)",
        "kvm_ioapic_set_irq: pin 1 dst 0 vec 1 (SMI|logical|edge)",
    )
    clues = identify(trace.read()).clues[1]
    assert (clues["guest"].line, clues["irqchip"].line) == (1, 3)


def test_each_vm_has_its_own_clues_and_the_hosts(trace: Recorder) -> None:
    trace.line("CPU 0/KVM-5 (    4)", EXIT.format("MSR_WRITE", 0xFFFFF80012345678))
    trace.line("CPU 0/KVM-9 (    8)", "kvm_msr: msr_write 830 = 0xfd")
    found = identify(trace.read())
    assert (values(found, 1)["guest"], values(found, 1)["vendor"]) == ("Windows", "vmx")
    assert "guest" not in values(found, 2)
    assert (values(found, 2)["apic_mode"], values(found, 2)["vendor"]) == ("x2APIC", "vmx")


def test_what_the_caller_knows_is_taken_as_told(trace: Recorder) -> None:
    trace.line("CPU 0/KVM-5", EXIT.format("MSR_WRITE", 1))
    clues = identify(trace.read(), {"vendor": "svm", "apicv": "on"}).clues[1]
    assert (clues["vendor"].value, clues["vendor"].source) == ("svm", "option")
    assert clues["apicv"].value == "on"
    with pytest.raises(ValueError, match="no such clue: colour"):
        identify(Recording("-", []), {"colour": "red"})


def test_threads_beside_vcpus_do_not_make_a_vm(trace: Recorder) -> None:
    trace.line("CPU 0/KVM-5", "kvm_entry: vcpu 0")
    trace.line("bash-99", "sched_switch: bash:99 [120] S ==> x:1 [120]")
    assert set(identify(trace.read()).clues) == {1}


SAMPLES = Path(__file__).parent / "data" / "traces"
_AMD = {"vendor": "svm", "generation": "6.1 to 6.12", "apicv": "off", "ipiv": "off", "apic_mode": "x2APIC"}


@pytest.mark.parametrize(
    ("sample", "threads", "expected"),
    [
        ("public/s01-kvmwiki-tracing-xapic32", [(1, 0)], {"vendor": "vmx", "irqchip": "full", "apic_mode": "xAPIC"}),
        ("public/s02-amd-idlehlt-nothread", [(1, 0)], _AMD),
        ("public/s02b-amd-idlehlt-thread-restored", [(1, 0)], _AMD),
        ("public/s05-win2012-trace_pipe-wrapped", [(1, -1)], {"generation": "seed-v3 to 5.10", "irqchip": "full"}),
        ("public/s07-kafl-windows-tracecmd", [(1, 0)], {"vendor": "vmx", "guest": "Windows"}),
        (
            "public/s09-nested-win-credguard-perf-decoded",
            [(1, 0)],
            {
                **{"vendor": "vmx", "generation": "6.1 to 6.12", "apicv": "on", "irqchip": "full", "nested": "yes"},
                **{"guest": "Windows"},
            },
        ),
        ("public/s11-nestedl1-ftrace-mmu", [(1, 0), (1, 1)], {"vendor": "vmx", "guest": "Linux"}),
        ("public/s12-windows-reinjected-ept", [(1, 0)], {"generation": "6.1 to 6.12", "apicv": "off"}),
        ("public/s16-perfprof-windows-apicwrite", [(1, 0)], {"vendor": "vmx", "apicv": "on", "guest": "Windows"}),
        ("public/s17-firecracker-perfscript", [(1, 1), (1, 0), (2, 1)], {"vendor": "vmx", "guest": "Linux"}),
        ("public/s18-hvtimer-trailing-newline-5.1", [(1, 0)], {"hv_timer": "on"}),
        ("public/s20-rfc-hyperv-level-nothread-tracecmd", [(1, 0)], {"nested": "yes", "hv_timer": "on"}),
        ("public/s23-hostguest-merged-CPU-comm", [(1, 1), (1, 0)], {"vendor": "vmx"}),
        ("public/s24-amd-tracecmd-gp-loop", [(1, 0)], {"vendor": "svm"}),
        ("public/s25-windows-hotplug-msr3a", [(1, 0), (1, 3), (1, 2), (1, 1)], {}),
        ("derived/d1-cpu2-only", [(1, 2)], {"apic_mode": "x2APIC"}),
        ("derived/d3-msi-then-ioapic", [(1, 0), (1, -1)], {"irqchip": "full"}),
        ("derived/d5-hv-icr", [(1, 0), (1, 1)], {"guest": "Windows", "hyperv": "yes"}),
        ("derived/d7-apicv-apic_write-trap", [(1, 0), (1, 1)], {"vendor": "vmx", "apicv": "on"}),
        ("derived/d7b-avic-incomplete", [(1, 0), (1, 1)], {"vendor": "svm", "apicv": "on"}),
        ("derived/d8-host-with-one-unresolvable-vm", [(1, 0), (2, 0), (2, 2)], _AMD),
        ("derived/d16-intel-l2-icr", [(1, 0), (1, 1)], {"vendor": "vmx", "nested": "yes"}),
        ("recorded/tracecmd-raw", [(1, -1), (1, 0), (1, 1)], {"generation": "6.1 to 7.3", "inhibits": "DISABLED"}),
        ("recorded/perfscript-plain", [(1, -1), (1, 0), (1, 1)], {"generation": "6.12 to 7.3"}),
    ],
)
def test_what_people_post(sample: str, threads: list[tuple[int, int]], expected: dict[str, str]) -> None:
    recording = read(SAMPLES / f"{sample}.txt")
    found = identify(recording)
    pairs = list(zip(found.where.vm.tolist(), found.where.vcpu.tolist()))[: len(recording.threads)]
    assert pairs == threads
    assert expected.items() <= values(found).items()
