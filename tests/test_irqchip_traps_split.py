"""What a naive split irqchip gets wrong: which EOIs leave to user space's IOAPIC, and when."""

from __future__ import annotations

import pytest

from irqchip_scene import JUDGES, scene

VECTOR, OTHER = 0x41, 0x52
LEVEL = 0x8000
MSI = 0xFEE0_0000
pytestmark = pytest.mark.parametrize("judge", JUDGES)


def test_trap_55_there_are_as_many_routes_as_pins(judge: str) -> None:
    """Of GSIs from the number of pins on nobody hears; 4096 pins are as good as none, which no Machine has."""
    with scene(judge, irqchip="split") as s:
        s.do("set_gsi_routing", (("msi", 23, MSI, VECTOR | LEVEL), ("msi", 24, MSI, OTHER | LEVEL)))
        for vector, told in ((VECTOR, (VECTOR,)), (OTHER, ())):
            s.page(isr=(vector,))
            s.run()
            s.eoi()
            s.run()
            assert s.result[1] == told


def test_trap_56_the_last_eoi_leaves_if_it_is_still_handled(judge: str) -> None:
    with scene(judge, irqchip="split") as s:
        s.do("set_gsi_routing", (("msi", 1, MSI, VECTOR | LEVEL), ("msi", 2, MSI, OTHER | LEVEL)))
        s.page(isr=(VECTOR, OTHER))
        s.run()
        s.eoi()
        s.eoi()
        s.run()
        assert s.result[1] == (VECTOR,)  # the lower one ended last
        s.run()
        assert s.result[1] == ()


def test_trap_57_edges_leave_too(judge: str) -> None:
    with scene(judge, irqchip="split") as s:
        s.do("set_gsi_routing", (("msi", 1, MSI, VECTOR | LEVEL),))
        s.run()
        s.do("signal_msi", MSI, VECTOR)
        assert s.do("take", 0) == VECTOR
        if judge == "plain":
            s.eoi()
            s.run()
        assert s.result[1] == (VECTOR,)


def test_chips_are_user_spaces(judge: str) -> None:
    with scene(judge, irqchip="split") as s:
        assert s.do("set_irqchip", 2, bytes(216)) == "refused"
        assert s.do("irqfd", 1, 3, True) == "refused"
        assert s.do("create_pit", True) == "refused"
        assert s.line(3, 1) == -1
        s.do("mem_read", 0, 0xFEC0_0000, 4)
        assert s.result[2][0].address == 0xFEC0_0000
        s.do("io_write", 0, 0x20, 0x11, 1)
        assert s.result[2][0].data == 0x11
