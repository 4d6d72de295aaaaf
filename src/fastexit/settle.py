"""What an embedder's CPU does between two instructions of its guest: exits that wait, and what goes in then.

An embedder that has a CPU of its own (an emulator's, or a real one without KVM's irqchip) keeps RFLAGS, the interrupt
shadow and the NMI mask of its vCPU as its CPU has them, and then::

    while v.settle():
        event = v.take()
        if event is None:
            ...                                     # the CPU runs, until it exits
        else:
            ...                                     # the CPU takes it
    # asleep, or KVM_RUN has returned: v.exit_reason

Models: nothing of KVM; the CPU's part of interrupt delivery, SDM vol. 3C 26.6.5 and 30.2, APM vol. 2 15.20 and 15.21.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastexit import layout as L
from fastexit import regs as R
from fastexit.events import Event, Interrupt, decode
from fastexit.jit.declare import load
from fastexit.outcome import Target
from fastexit.reasons import KvmExit
from fastexit.targets import tell

if TYPE_CHECKING:
    from fastexit.vcpu import Vcpu


def settle(v: Vcpu) -> bool:
    """Vcpu.settle. Each exit begins a list of targets anew; what all of them asked for is one list in the end."""
    told: tuple[Target, ...] = ()
    runs = True
    while runs and not waits_to_go_in(v) and (acted := _act(v)) is not None:
        told += v.targets
        runs = acted
    tell(v.machine.mem, v.index, told)
    return runs or waits_to_go_in(v)


def _act(v: Vcpu) -> bool | None:
    """The next thing that happens: False for a KVM_RUN that ended outside; None where nothing is left to do."""
    vendor = v.machine.dispatcher.vendor
    mode = v.mode
    if mode == R.OUTSIDE_GUEST_MODE:
        return v.run()
    if mode == R.EXITING_GUEST_MODE:
        v.exit(vendor.interrupt_reason)
    elif v.irq_window and takes_interrupts(v):
        # What user space waits for it gets, and would get again by the next KVM_RUN.
        return v.exit(vendor.window_reason).user is not KvmExit.IRQ_WINDOW_OPEN
    elif v.nmi_window and not v.nmi_masked and not v.shadow and v.gif:
        v.exit(vendor.nmi_window_reason)
    else:
        v.hw_notify()
        return None
    return True


def takes_interrupts(v: Vcpu) -> bool:
    """The guest's CPU takes maskable interrupts now. SVM's global interrupt flag stands above RFLAGS.IF."""
    return bool(v.rflags & R.RFLAGS_IF) and not v.shadow and v.gif


def take(v: Vcpu) -> Event | None:
    """Vcpu.take."""
    word = load("take_event")(v.machine.handle, v.index)
    if word:
        return decode(word)
    if v.mode == R.OUTSIDE_GUEST_MODE or not v.apicv or not takes_interrupts(v):
        return None
    vector = v.ack() if v.machine.vendor == "svm" else v.hw_deliver()
    return None if vector is None else Interrupt(vector)


def waits_to_go_in(v: Vcpu) -> bool:
    """Whether take() would give something that an entry has injected; what APICv delivers is not looked at."""
    return bool(v.machine.mem[L.IRQ + v.index * L.IRQ_STRIDE + L.IRQ_WENT_IN])
