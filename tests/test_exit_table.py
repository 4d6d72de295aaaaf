"""The table of exits: a row a reason, and rows that say what the package does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from enum import IntEnum

import numpy as np
import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as r
from fastexit.costs.meter import WORKS
from fastexit.exits.handlers import CommonHandlers
from fastexit.exits.svm import Svm
from fastexit.exits.table import SVM, VMX, Op, Row, Table, packed, packed_rows
from fastexit.exits.vmx import Vmx
from fastexit.profile import PROFILES
from fastexit.releases import release
from fastexit.traits import OLDEST, Trait

TABLES = {"vmx": VMX, "svm": SVM}
EXCEPTIONS = range(0x40, 0x60)
ROWS = [pytest.param(vendor, row, id=f"{vendor}-{row.reason}") for vendor in TABLES for row in TABLES[vendor].values()]


@pytest.mark.parametrize(("table", "numbers"), [(VMX, fx.VmxExit), (SVM, fx.SvmExit)])
def test_every_reason_has_a_row(table: Table, numbers: type[IntEnum]) -> None:
    """And no row is of a number that reasons.py does not have, except SVM's intercepted exceptions."""
    extra = set(table) - {int(number) for number in numbers}
    assert {int(number) for number in numbers} <= set(table)
    assert extra <= (set(EXCEPTIONS) if table is SVM else set())


def test_one_row_a_reason() -> None:
    with pytest.raises(ValueError, match="two rows for exit <VmxExit.HLT: 12>"):
        Table([Row(fx.VmxExit.HLT), Row(fx.VmxExit.CPUID), Row(fx.VmxExit.HLT, length=1)], spelled=str)


@pytest.mark.parametrize(("vendor", "row"), ROWS)
def test_a_row_names_what_there_is(vendor: str, row: Row) -> None:
    """Handlers are methods, work is known, releases too; a twin has a handler and no trait of its own."""
    for name in filter(None, (row.handler, row.fast, row.irqoff)):
        assert any(callable(getattr(place, name, None)) for place in (Vmx if vendor == "vmx" else Svm, CommonHandlers))
    assert row.work in WORKS
    assert all(first == OLDEST or release(first) for first in (row.since, *(row.renamed or ())[:1]))
    assert 0 <= row.length < 16
    if row.handler == "operation":
        assert row.operation
    if row.operation:
        assert row.handler
        assert not row.trait


def test_what_a_number_without_a_row_means() -> None:
    row = VMX[0xFFF0]
    assert (row.handler, row.operation, row.shortcut, row.user) == (None, Op.NONE, False, fx.KvmExit.INTERNAL_ERROR)
    assert row.names() == {}
    assert 0xFFF0 not in VMX


def test_names() -> None:
    """By default the name in reasons.py, in lower case on SVM; a rename keeps the older one for older releases."""
    assert VMX[fx.VmxExit.MSR_WRITE].names() == {OLDEST: "MSR_WRITE"}
    assert SVM[fx.SvmExit.MSR].names() == {OLDEST: "msr"}
    assert VMX[fx.VmxExit.INTERRUPT_WINDOW].names() == {OLDEST: "PENDING_INTERRUPT", "5.6": "INTERRUPT_WINDOW"}
    assert VMX[fx.VmxExit.BUS_LOCK].names() == {"6.1": "BUS_LOCK"}
    assert VMX[fx.VmxExit.OTHER_SMI].names() == {}


def test_every_operation_is_some_exits() -> None:
    """One that no row asks for, not even by MSR, MMIO or IO, would be dead code in the compiled loop."""
    used = Counter(row.operation for table in TABLES.values() for row in table.values())
    halves = {Op.WRMSR, Op.RDMSR, Op.MMIO_WRITE, Op.MMIO_READ, Op.IO_WRITE, Op.IO_READ}
    assert set(Op) - set(used) <= halves


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_packed_rows(table: Table) -> None:
    """The compiled loop's table has the rows with an operation, each at its number, and nothing else."""
    words = packed_rows(table)
    assert {i for i, word in enumerate(words) if word} == {int(row.reason) for row in table.values() if row.operation}
    assert all(words[row.reason] == packed(row) for row in table.values() if row.operation)
    assert words[-1]


@pytest.mark.parametrize("vendor", TABLES)
@pytest.mark.parametrize("reason", [0x80, 0x404, 1 << 12, 0xFFFF_FFFE])
def test_batch_of_a_number_beyond_the_table(vendor: str, reason: int) -> None:
    """It is no exit that anything handles, and the batch goes on behind it."""
    m = fx.Machine(vcpus=1, vendor=vendor)
    msr = m.dispatcher.vendor.rdmsr_reason
    exits = np.array([(0, reason, 0x830, 1, 0, 0), (0, msr, r.MSR_APICBASE, 0, 0, 0)], dtype=fx.EXIT)
    first, second = m.run(exits)
    assert fx.OUTCOMES[int(first["code"])].user is fx.KvmExit.INTERNAL_ERROR
    assert second["value"] == m.vcpus[0].apic_base


# -------------------------------------------------------------------------------------------- what the fast columns say


def fast_rows() -> Iterator[tuple[str, str, Row]]:
    for vendor, table in TABLES.items():
        for kernel in PROFILES:
            yield from ((vendor, kernel, row) for row in table.values() if row.fast or row.irqoff)


FAST = [pytest.param(*case, id=f"{case[0]}-{case[1]}-{case[2].name}") for case in fast_rows()]


@pytest.mark.parametrize(
    ("vendor", "kernel", "row"), [pytest.param(*c, id=f"{c[:2]}-{c[2].name}") for c in fast_rows()]
)
def test_generations_with_a_fast_handler(vendor: str, kernel: str, row: Row) -> None:
    """An exit that can be handled fast is, in the generations whose traits the row asks for and in no other."""
    m = fx.Machine(vcpus=2, vendor=vendor, kernel=kernel, apicv=False, tsc_khz=1_000_000)
    m.boot_x2apic()
    v = m.vcpus[0]
    v.set_msr(0x832, r.LVT_TIMER_DEADLINE | 0xEC)
    v.set_msr(r.MSR_TSC_DEADLINE, 1 << 30)
    v.run()
    out = v.exit(row.reason, msr=0x830, value=fx.icr(dest=1, vector=0x41), info1=1)
    traits = PROFILES[kernel].traits
    if traits & Trait.HOOK_IRQOFF:
        fast = row.irqoff is not None and not (vendor == "svm" and traits & Trait.SVM_EXIT_32)
    else:
        wanted = row.trait | row.fast_trait
        fast = row.fast is not None and traits & wanted == wanted
    assert out.path is (fx.Path.FAST if fast else fx.Path.SLOW)


@pytest.mark.parametrize(
    ("vendor", "kernel", "row"), [pytest.param(*c, id=f"{c[:2]}-{c[2].name}") for c in fast_rows()]
)
def test_which_fast_handlers_take_srcu(vendor: str, kernel: str, row: Row) -> None:
    """In generations that take it in the fast path: once more than the exit itself does when it leaves the guest."""
    m = fx.Machine(vcpus=2, vendor=vendor, kernel=kernel, apicv=False)
    m.boot_x2apic()
    v = m.vcpus[0]
    v.run()
    before = m.mem[v.own + L.K_SRCU_LOCKS]
    out = v.exit(row.reason, msr=0x830, value=fx.icr(dest=1, vector=0x41), info1=1)
    traits, wanted = PROFILES[kernel].traits, row.trait | row.fast_trait
    takes = row.srcu and traits & wanted == wanted and bool(traits & Trait.SRCU_IN_FASTPATH)
    assert m.mem[v.own + L.K_SRCU_LOCKS] - before == (not out.reentered) + takes
