"""A difference as a Python script that shows it: the same calls on the model and on /dev/kvm, side by side.

Models: nothing.
"""

from __future__ import annotations

import struct
from typing import Any

from fastexit import regs as r
from fastexit.kvm.judge import Judge
from fastexit.kvm.operations import GUEST_OPS, Op

WHO_LOCAL, WHO_OTHER = "Run it as a user who may open /dev/kvm;", "When it is run"

_HEAD = '''"""{text}

Found {where}. {who} the exit code is 1 while it shows.
"""

import struct
import sys
from contextlib import closing

import fastexit as fx
from fastexit.kvm.operations import set_regs
{imports}
KEYWORDS = {keywords}


def page(registers):
    """A LAPIC page that is 0 but for these dwords."""
    data = bytearray(1024)
    for offset, value in registers.items():
        struct.pack_into("<I", data, offset, value)
    return bytes(data)


def ready(v):
    """Able to run instructions: nothing pending, RUNNABLE, KVM_SET_SREGS with what it has."""
    v.set_events(nmi_pending=0)
    v.get_mp_state()
    v.set_mp_state(0)
    v.ready(again=True) if hasattr(v, "ready") else v.set_sregs()


def refresh(v):
    """Reads PPR, which stores it: whether a run does so depends on what else happens in it."""
    if v.apic_base & 0xC00 == 0xC00:
        v.get_msr(0x80A)
    elif v.apic_base & 0x800:
        set_regs(v)
        v.mmio_read(0xA0)


def attempt(call, *arguments, **more):
    """What a call returns; of an exit, its fault and why user space was asked."""
    try:
        result = call(*arguments, **more)
    except (ValueError, fx.GeneralProtection) as error:
        return type(error).__name__
    return (result.fault, result.user) if isinstance(result, fx.Outcome) else result


def story(m):
    """The operations; after each one what they returned and what is visible."""
    v = m.vcpus
{calls}

def look(m):
    """Every register but TMCCT, which depends on the time of day, and what waits."""
    for v in m.vcpus:
        for offset, value in zip(range(0, 1024, 4), struct.unpack("<256I", v.get_lapic())):
            if offset != 0x390:
                yield f"  vCPU {{v.index}} page {{offset:#x}}", hex(value)
        yield f"  vCPU {{v.index}} events", v.events()
{state}

with {opens}:
    model = fx.Machine(**real.keywords | KEYWORDS)
    different = 0
    for (what, expected), (_, got) in zip(story(model), story(real)):
        if expected != got:
            different += 1
            print(f"! {{what}}: model {{expected}}, KVM {{got}}")
        elif not what.startswith("  "):
            print(f"  {{what}}: {{got}}")
sys.exit(different > 0)
'''

_REPLAY = '''"""{text}

Found {where}. {who} the exit code is 1 while it shows.
"""

import struct
import sys

import fastexit as fx
from fastexit.kvm.comparison import replay
{imports}

def page(registers):
    """A LAPIC page that is 0 but for these dwords."""
    data = bytearray(1024)
    for offset, value in registers.items():
        struct.pack_into("<I", data, offset, value)
    return bytes(data)


KEYWORDS = {keywords}
OPERATIONS = [
{ops}]

{replay}
print(found or "no difference")
sys.exit(found is not None)
'''


def script(text: str, kind: str, keywords: dict[str, Any], ops: list[Op], judge: Judge, traced: bool = False) -> str:
    """The script's text: plain calls where there are such, a replay for kinds with operations of their own."""
    shown = {
        name: int(value) if isinstance(value, int) and type(value) is not bool else value
        for name, value in keywords.items()
    }
    where = {
        "where": f"on kernel {judge.host.release} ({judge.host.module or 'KVM'})"
        if judge.face is None
        else f"in {judge.name}, held against the rules of {judge.host.kernel}",
        "who": WHO_LOCAL if judge.opens.startswith("Oracle") else WHO_OTHER,
        "imports": judge.imports + "\n" * bool(judge.imports),
    }
    text = text.replace("\\", "\\\\").replace('"""', "'''")
    if traced or kind not in ("msr", "guest", "many"):
        return _REPLAY.format(
            text=text,
            **where,
            keywords=shown,
            ops="".join(f"    ({', '.join(map(_literal, op))}{',' * (len(op) == 1)}),\n" for op in ops),
            replay=_replay_call(kind, traced, *judge.replayed),
        )
    state = '        yield f"  vCPU {v.index} mp_state", v.get_mp_state()\n' if kind == "guest" else ""
    calls = "".join(f"{_lines(op)}    yield from look(m)\n" for op in ops)
    return _HEAD.format(text=text, **where, opens=judge.opens, keywords=shown, calls=calls, state=state)


def _replay_call(kind: str, traced: bool, argument: str, opens: str) -> str:
    """The replay, inside of what it needs to be open."""
    call = f"found = replay({kind!r}, KEYWORDS, OPERATIONS, traced={traced}{', ' if argument else ''}{argument})"
    return f"with {opens}:\n    {call}" if opens else call


def _lines(op: Op) -> str:
    """One operation as lines of the story."""
    if op[0] not in GUEST_OPS:
        return f"    yield {_call(op)}\n"
    return f"    refresh(v[{op[1]}])\n    set_regs(v[{op[1]}])\n    yield {_call(op)}\n    refresh(v[{op[1]}])\n"


def _call(op: Op) -> str:
    """``what, result`` of one operation, as Python."""
    name, *arguments = op
    if name in ("signal_msi", "enable_x2apic_api", "boot_x2apic", "add_vcpu"):
        shown = ", ".join(_literal(a) for a in arguments)
        call = f"attempt(m.{name}{', ' if shown else ''}{shown})"
        return f'"{name}", {call if name != "add_vcpu" else f"{call} and None"}'
    i, *rest = arguments
    what = f'"vCPU {i} {name}", '
    if name in ("cr8", "cs"):
        return f"{what}v[{i}].{name}"
    if name == "ready":
        return f"{what}ready(v[{i}])"
    if name == "set_events":
        nmi_pending, nmi_masked, sipi_vector, latched_init = rest
        more = "" if latched_init is None else f", smm=False, latched_init={latched_init}"
        return (
            f"{what}attempt(v[{i}].set_events, nmi_pending={nmi_pending}, nmi_masked={nmi_masked}, "
            f"sipi_vector={sipi_vector}{more})"
        )
    if name == "set_sregs":
        return f"{what}attempt(v[{i}].set_sregs, apic_base={rest[0]:#x}, cr8={rest[1]:#x})"
    return f"{what}attempt({', '.join([f'v[{i}].{name}', *map(_literal, rest)])})"


def _literal(value: Any) -> str:
    if isinstance(value, bytes) and len(value) == r.LAPIC_PAGE_BYTES:
        dwords = zip(range(0, r.LAPIC_PAGE_BYTES, 4), struct.unpack("<256I", value), strict=True)
        return "page({" + ", ".join(f"{o:#x}: {v:#x}" for o, v in dwords if v) + "})"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{int(value):#x}" if value > 9 else str(int(value))
    return repr(value)
