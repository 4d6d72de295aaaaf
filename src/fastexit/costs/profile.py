"""What the stages of an exit cost: named tables of cycles, one for a micro-architecture and its mitigations.

Models: time, which KVM's source does not have. A stage is a piece of work that the run loop charges where it does it
(dispatcher.py), so two generations differ by what they skip. Every number has a source: a citation, or the word
"assumed". Tables are TOML files; those of the package lie beside this file.
"""

from __future__ import annotations

import difflib
import operator
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

from fastexit.checks import quoted

STAGES: dict[str, str] = {
    # -- the CPU changes sides
    "vm_exit": "from the guest's instruction to the first instruction of the host, guest registers saved",
    "vm_entry": "guest registers loaded, VMRESUME or VMRUN, to the guest's next instruction",
    "mitigation_exit": "what the mitigation set adds to an exit: return stack stuffed, SPEC_CTRL saved and restored",
    "mitigation_entry": "what the mitigation set adds to an entry: SPEC_CTRL restored, buffers cleared",
    # -- the steps of vcpu_enter_guest, in the order in which an exit meets them
    "exit_info": "step 11: exit reason, qualification, vectoring information, NMI recovery",
    "fast_check": "step 11 or 14: the fast handler looks whether the exit is for it",
    "reenter": "step 12: the re-entry loop: PIR looked at, exit requested?",
    "guest_mode_outside": "step 13: host debug registers, last guest TSC, vcpu->mode",
    "irqoff_handler": "step 14: the vendor's handle_exit_irqoff",
    "irq_window": "step 15: host interrupts on and off again",
    "guest_time_stop": "step 16: time accounting, interrupts and preemption on",
    "srcu_lock": "taking the SRCU read lock, full barrier included: step 17, and around some fast handlers",
    "vapic_sync": "step 18: profiling, vAPIC and PV EOI looked at",
    "exit_checks": "step 20: what the vendor's handle_exit asks before it looks for a handler",
    "loop_tail": "vcpu_run between two iterations: timer pending, signals, rescheduling",
    "requests": "step 2: requests that are pending are looked through",
    "event_check": "step 3: looking for an event to inject",
    "inject": "step 3: an event written into the VMCS or VMCB",
    "prepare_switch": "steps 1 and 4: preemption off, prepare the switch to the guest",
    "irqs_off": "step 5",
    "enter_mode": "steps 6, 8, 9: IN_GUEST_MODE, barrier, PIR looked at, exit requested?",
    "srcu_unlock": "dropping the SRCU read lock: step 7, and around some fast handlers",
    "guest_state": "step 10: FPU, debug registers, guest time",
    "block": "a vCPU that waits: vcpu_block up to the scheduler",
    "user_exit": "KVM_RUN returns: vcpu_put, back to user space",
    # -- calls
    "vendor_call": "a call through kvm_x86_ops or the host's APIC driver where that is a pointer, above a direct call",
    "dispatch_direct": "step 20: a handler reached by comparison (retpoline shortcut)",
    "dispatch_indirect": "step 20: a handler reached through the table",
    # -- work of handlers
    "msr_access": "generic RDMSR or WRMSR emulation: registers, filter, the switch over MSRs",
    "skip": "the instruction is skipped: RIP, interrupt shadow",
    "lapic_access": "one local APIC register emulated",
    "device": "one register of IOAPIC, PIC or PIT emulated, its lock taken",
    "ioapic_eoi": "the IOAPIC looked through for pins whose vector has ended, its lock taken",
    "icr": "the ICR decoded, target looked up in the APIC map, ICR stored",
    "accept": "one target's APIC accepts: TMR, IRR or PIR and ON",
    "timer": "the guest's timer set or expired: clock reads, scaling",
    "preemption_timer": "the VMX preemption timer written",
    "hrtimer": "an hrtimer started or cancelled",
    "emulator": "an access to a device's page that the instruction emulator has to decode, its fault included",
    "halt": "kvm_emulate_halt",
    "hypercall": "a hypercall's registers and its switch",
    "hv_hypercall": "one of Hyper-V's: mode, registers, control word, CPUID bits, its switch",
    "hv_target": "one vCPU of the VM looked for in a set of virtual processors",
    "guest_memory": "input of a hypercall read from the guest's memory",
    "host_irq": "the host's own handler of the interrupt that caused an exit",
    "other_exit": "the handler of any other exit",
    # -- telling the target
    "notify": "a posted-interrupt notification sent by the host",
    "kick": "the reschedule IPI sent by the host",
    "wake": "a sleeping thread made runnable, its pCPU told",
    "doorbell": "AVIC's doorbell rung",
    # -- what the CPU does without an exit
    "hw_access": "an access to a virtualised APIC register",
    "hw_ipi": "an IPI that the CPU sends by itself (IPI virtualisation, AVIC)",
    # -- the way to the target and into its guest
    "flight": "from an interrupt's sending to its arrival at another pCPU",
    "posted": "a notification or doorbell taken by a running guest, up to the delivery of the interrupt",
    "schedule": "from a thread's wake-up until its KVM_RUN goes on",
    "guest_irq": "an interrupt through the guest's IDT and back: gate, entry code, IRET",
}
"""Stage -> what it is. A table has all of them."""

_HEAD = ("description", "ghz")
_COSTS = Path(__file__).parent


@dataclass(frozen=True)
class Cost:
    """One number and where it comes from."""

    cycles: int
    source: str


class CostProfile(Mapping[str, int]):
    """A table of stage costs: ``profile["vm_exit"]`` in cycles. Immutable.

    ``name``; ``description``: which machine, which mitigations; ``ghz``: cycles a nanosecond, with ``ghz_source``;
    ``costs``: stage -> Cost, for the sources.
    """

    def __init__(self, name: str, description: str, ghz: float, ghz_source: str, costs: Mapping[str, Cost]) -> None:
        self.name = name
        self.description = description
        self.ghz = ghz
        self.ghz_source = ghz_source
        self.costs: dict[str, Cost] = dict(costs)
        self.cycles: dict[str, int] = {stage: self.costs[stage].cycles for stage in STAGES}

    def __getitem__(self, stage: str) -> int:
        return self.cycles[stage]

    def __iter__(self) -> Iterator[str]:
        return iter(self.cycles)

    def __len__(self) -> int:
        return len(self.cycles)

    def __repr__(self) -> str:
        return f"<CostProfile {self.name}, {self.ghz:g} GHz>"

    def ns(self, cycles: float) -> float:
        """Cycles as nanoseconds."""
        return cycles / self.ghz

    @classmethod
    def derive(
        cls,
        base: str | CostProfile,
        *,
        name: str | None = None,
        description: str | None = None,
        ghz: float | Mapping[str, Any] | None = None,
        **stages: int | Mapping[str, Any],
    ) -> CostProfile:
        """A table with other numbers than its base: ``CostProfile.derive("skylake-retpoline", vm_exit=510)``.

        A number may bring its source, ``{"cycles": 510, "source": "..."}``; without one its source is "given".
        TypeError or ValueError for what is no stage and no number.
        """
        head = {"name": name, "description": description, "ghz": ghz}
        return cls.of({"base": base} | {key: value for key, value in head.items() if value is not None} | stages)

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> CostProfile:
        """A table from a dict, as Machine(costs=...) takes it: numbers by stage.

        ``base``, the name of a table or a CostProfile, gives what is not there; without it every stage, ``ghz`` and
        ``description`` have to be. ``name`` is its name, by default the base's with a mark that it was changed.
        """
        where = "costs"
        for key in table:
            if not isinstance(key, str):
                raise TypeError(f"{where}: {key!r} is no name of a stage")
        given = {key: _given(key, value, where) for key, value in table.items() if key != "name"}
        base = given.get("base")
        name = table.get("name", "given" if base is None else f"{getattr(base, 'name', base)}, changed")
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{where}: name is not a text")
        return cls.parse(name, given, where)

    @classmethod
    def load(cls, path: str | Path) -> CostProfile:
        """A table from a TOML file.

        ``description``; ``ghz = { value = 2.5, source = "..." }``; for every stage of cost.STAGES
        ``stage = { cycles = 40, source = "..." }``. With ``base = "skylake-retpoline"`` the file needs to have only
        what differs from that table. The name is that of the file. OSError, or ValueError in one line.
        """
        path = Path(path)
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: byte {error.start} is not UTF-8") from None
        except ValueError as error:  # TOMLDecodeError, or a number that int() refuses for its length
            raise ValueError(f"{path}: {error}") from None
        except RecursionError:
            raise ValueError(f"{path}: nested too deeply for a table of costs") from None
        return cls.parse(path.stem, table, str(path))

    @classmethod
    def parse(cls, name: str, table: Mapping[str, Any], where: str) -> CostProfile:
        """A table from what tomllib gives; ``where`` opens the complaints."""
        base: CostProfile | None = None
        if "base" in table:
            if not isinstance(table["base"], CostProfile) and table["base"] not in cost_profiles():
                raise ValueError(f"{where}: base is none of {', '.join(cost_profiles())}")
            base = cost_profile(table["base"])
        unknown = sorted(set(table) - set(STAGES) - set(_HEAD) - {"base"})
        if unknown:
            near = difflib.get_close_matches(unknown[0], (*STAGES, *_HEAD, "base"), n=1)
            raise ValueError(f"{where}: unknown key {quoted(unknown[0])}" + (f", not {near[0]}?" if near else ""))
        missing = [key for key in (*_HEAD, *STAGES) if key not in table]
        if missing and base is None:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"{where}: {missing[0]} is missing{more}, which base = NAME would give")
        description = table["description"] if "description" in table else base.description  # type: ignore[union-attr]
        if not isinstance(description, str) or not description.strip():
            raise ValueError(f"{where}: description is not a text")
        ghz, ghz_source = (base.ghz, base.ghz_source) if base else (0.0, "")
        if "ghz" in table:
            ghz, ghz_source = _number(table["ghz"], "value", f"{where}: ghz")
            if not 0.01 <= ghz <= 100:
                raise ValueError(f"{where}: ghz: {ghz} is no clock rate in GHz")
        costs = dict(base.costs) if base else {}
        for stage in STAGES:
            if stage in table:
                cycles, source = _number(table[stage], "cycles", f"{where}: {stage}")
                if type(cycles) is not int:
                    raise ValueError(f"{where}: {stage}: cycles are whole numbers, not {cycles}")
                if not 0 <= cycles < 1 << 40:
                    raise ValueError(
                        f"{where}: {stage}: {cycles} cycles is " + ("negative" if cycles < 0 else "too much")
                    )
                costs[stage] = Cost(cycles, source)
        return cls(name, description.strip(), float(ghz), ghz_source, costs)


Costs: TypeAlias = str | CostProfile | Mapping[str, Any]
"""What names a table: its name, itself, or a dict of numbers."""


def _given(key: str, value: Any, where: str) -> Any:
    """A number of a dict as TOML has it: with a source."""
    if key not in STAGES and key != "ghz":
        return value
    unit = "value" if key == "ghz" else "cycles"
    if isinstance(value, Mapping):
        return {"source": "given"} | dict(value)
    if isinstance(value, bool) or isinstance(value, str):
        raise TypeError(f"{where}: {key} is {type(value).__name__}, not a number")
    try:
        number = float(value) if key == "ghz" else operator.index(value)
    except TypeError:
        if isinstance(value, float):
            raise ValueError(f"{where}: {key}: cycles are whole numbers, not {value}") from None
        raise TypeError(f"{where}: {key} is {type(value).__name__}, not a number") from None
    return {unit: number, "source": "given"}


def _number(entry: Any, key: str, where: str) -> tuple[Any, str]:
    """The number and the source of ``{ key = number, source = "..." }``."""
    if not isinstance(entry, dict):
        raise ValueError(f'{where} is not {{ {key} = NUMBER, source = "..." }}')
    unknown = sorted(set(entry) - {key, "source"})
    if unknown:
        raise ValueError(f"{where}: unknown key {quoted(unknown[0])}")
    for part in (key, "source"):
        if part not in entry:
            raise ValueError(f"{where}: {part} is missing")
    value, source = entry[key], entry["source"]
    if type(value) not in (int, float):
        raise ValueError(f"{where}: {key} is not a number")
    if not isinstance(source, str) or not source.strip():
        raise ValueError(f'{where}: source is not a text (a citation, or "assumed")')
    return value, source.strip()


@cache
def cost_profiles() -> tuple[str, ...]:
    """Names of the tables that come with the package."""
    return tuple(sorted(path.stem for path in _COSTS.glob("*.toml")))


@cache
def _bundled(name: str) -> CostProfile:
    return CostProfile.load(_COSTS / f"{name}.toml")


def cost_profile(name: Costs) -> CostProfile:
    """The table of that name, the table itself, or a dict's (CostProfile.of); ValueError lists the known names."""
    if isinstance(name, CostProfile):
        return name
    if isinstance(name, Mapping):
        return CostProfile.of(name)
    if not isinstance(name, str):
        raise TypeError(f"costs is {type(name).__name__}, neither the name of a cost profile, a CostProfile nor a dict")
    if name not in cost_profiles():
        raise ValueError(f"unknown cost profile {quoted(name)}: one of {', '.join(cost_profiles())}")
    return _bundled(name)
