"""Who decides what is right: /dev/kvm of this machine, a lab's kernel, or anything that has Oracle's face.

Models: nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fastexit import regs as R
from fastexit.kvm import host as H
from fastexit.kvm.apics import face
from fastexit.kvm.oracle import Oracle
from fastexit.kvm.tracefs import KernelTrace
from fastexit.layout import MAX_VCPU_ID, MAX_VCPUS
from fastexit.profile import NEWEST

if TYPE_CHECKING:
    from fastexit.kvm.lab.lab import Lab
    from fastexit.kvm.twins import Twins


@dataclass(frozen=True)
class Judge:
    """What machines come from.

    Attributes:
        make: gives a machine with Oracle's face, by Oracle's keywords. host: what the model has to know of it.
        name: what reports call it.
        imports, opens: how a script has it: an import line, and what its with statement opens as ``real``.
        replayed: what `comparison.replay` is told in a script, and the with statement around it.
        trace: opens what tells its trace lines; None where there are none.
        special: kinds of comparison that are others here than usual, with who judges them.
        sessions: how many machines live at a time. inside: what a thread that runs one of them is in.
        face: what somebody's own APICs know (`apics.face`); None for what has all of Oracle's face.
        kinds: the kinds of comparison that there are; () for all that have what they need.
        well_formed, ignored, groups: what `OwnTwins` draws and compares, as `comparison.verify` was told.
    """

    make: Callable[..., Any]
    host: H.Host
    name: str
    imports: str
    opens: str
    replayed: tuple[str, str] = ("", "")
    trace: Callable[[], AbstractContextManager[Any]] | None = None
    sessions: int = 1
    inside: Callable[[], AbstractContextManager[None]] = nullcontext
    special: Mapping[str, Callable[[], tuple[type[Twins], Judge]]] = field(default_factory=dict)
    face: Callable[[], frozenset[str]] | None = None
    kinds: tuple[str, ...] = ()
    well_formed: bool = False
    ignored: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()


def local() -> Judge:
    """/dev/kvm of this machine; KvmUnavailable where it cannot be used."""
    return Judge(
        Oracle,
        H.running(),
        "/dev/kvm",
        "from fastexit.kvm import Oracle",
        "Oracle(**KEYWORDS) as real",
        trace=KernelTrace,
    )


def of(other: Callable[..., Any] | Lab | Judge | None) -> Judge:
    """The judge that ``other`` means: None is this machine's KVM, a Lab its kernel, a callable makes machines.

    So does an object's method ``machine``.
    """
    if other is None:
        return local()
    if isinstance(other, Judge):
        return other
    judge = getattr(other, "judge", None)
    if judge is not None:
        if isinstance(other, type):
            raise TypeError(
                f"{other.__name__} is a class: one that has been made is what verify asks, {other.__name__}(...)"
            )
        found: Judge = judge()
        return found
    make = other if callable(other) else getattr(other, "machine", None)
    if not callable(make):
        raise TypeError(f"{other!r} is neither a Lab nor something that makes machines, nor has it a method machine")
    return _maker(make)


def _maker(make: Callable[..., Any]) -> Judge:
    """Somebody's own APIC: ``make.host`` says what it is like, otherwise the newest kernel's VMX without APICv."""
    place, name = getattr(make, "__module__", None), getattr(make, "__qualname__", "")
    known = place and name.isidentifier()
    host = getattr(make, "host", None)
    made: list[frozenset[str]] = []

    def known_of_one() -> frozenset[str]:
        """What a machine of theirs has; made once."""
        if not made:
            one = make(apic_ids=[0])
            made.append(face(one))
            getattr(one, "close", bool)()
        return made[0]

    return Judge(
        make,
        host if isinstance(host, H.Host) else own_host(),
        name or type(make).__name__,
        f"from {place} import {name} as other" if known else "other = ...  # what verify was given",
        "closing(other(**KEYWORDS)) as real",
        ("other=other", ""),
        face=known_of_one,
    )


def own_host(kernel: str = NEWEST) -> H.Host:
    """Whose rules an own APIC is held against that says nothing: a kernel's, without a shortest period of timers."""
    return replace(plain(kernel), min_timer_period_us=0)


def plain(kernel: str = NEWEST) -> H.Host:
    """A host without anything unusual: what is compared with a maker of machines that says nothing of itself."""
    return H.Host(
        release=kernel,
        kernel=kernel,
        module="",
        api=R.X2ApicApi(3),
        api_split=R.X2ApicApi(3),
        icr_split=False,
        fastpath=True,
        eoi_at_injection=False,
        vector_hashing=True,
        min_timer_period_us=200,
        pi_inject_timer=False,
        ignore_msrs=False,
        apicv=False,
        smm=True,
        cmci=True,
        quirks=0x7FF,
        bus_cycles=True,
        max_vcpus=MAX_VCPUS,
        max_vcpu_id=MAX_VCPU_ID + 1,
    )
