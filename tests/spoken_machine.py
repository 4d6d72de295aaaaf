"""A Machine that speaks docs/apic-protocol.md, all of it: python spoken_machine.py KERNEL [WORD...], words left out."""

from __future__ import annotations

import sys

import fastexit as fx
from fastexit.kvm.own import settle, taken
from fastexit.kvm.spoken import CAPABILITIES

KERNEL, *WITHOUT = sys.argv[1:] or [fx.profiles()[-1]]
METHODS = {"write": "mmio_write", "read": "mmio_read"}


def machine(ids: str, *settings: str) -> fx.Machine:
    """Configured as it is told."""
    told = dict(setting.split("=") for setting in settings)
    numbers = {name: int(value) if value.isdecimal() else value for name, value in told.items()}
    plain = {"kernel": KERNEL, "apicv": False, "threads": False, "hv_timer": False, "min_timer_period_us": 0}
    made = fx.Machine(apic_ids=[int(text) for text in ids.split(",")], **plain | numbers)
    for vcpu in made.vcpus:
        vcpu.set_mp_state(0)
    return made


def answer(m: fx.Machine, word: str, first: str, *rest: str) -> str:
    """To one request."""
    numbers = [int(text, 0) for text in rest if word != "set_lapic"]
    if word == "msi":
        return f"ok {max(m.signal_msi(int(first, 0), *numbers), 0)}"
    if word == "time":
        m.set_time(int(first))
        for vcpu in m.vcpus:
            settle(vcpu, "take" in WITHOUT)
        return "ok"
    vcpu = m.vcpus[int(first)]
    if word == "take":
        return f"ok {taken(vcpu)}"
    if word == "lapic":
        return f"ok {vcpu.get_lapic().hex()}"
    if word == "set_lapic":
        vcpu.set_lapic(bytes.fromhex(rest[0]))
        return "ok"
    try:
        result = getattr(vcpu, METHODS.get(word, word))(*numbers)
    except fx.GeneralProtection:
        return "gp"
    if word in ("wrmsr", "set_msr", "write"):
        settle(vcpu, "take" in WITHOUT)
        return "gp" if result is False or getattr(result, "fault", None) else "ok"
    if word == "get_msr" and result is None:
        return "gp"
    return "ok none" if result is None else f"ok {result:#x}"


def main() -> None:
    """One answer a line, until standard input ends."""
    m = None
    for line in sys.stdin:
        word, *rest = line.split()
        if word == "hello":
            known = " ".join(word for word in CAPABILITIES if word not in WITHOUT)
            said = f"ok 1 Machine({KERNEL}) {known} from-the-future"
        elif word == "machine":
            m, said = machine(*rest), "ok"
        else:
            said = answer(m, word, *rest)
        print(said, flush=True)


if __name__ == "__main__":
    main()
