"""Compare what ``embed_c check FILE`` wrote with the Python door: every result, the memory, the LAPIC pages."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import fastexit as fx
from fastexit.embed.cabi import RESULT, Status

RECORD = np.dtype(
    [("value", "<u8"), ("result", RESULT), ("taken", "<u4"), ("vector", "<u4"), ("ended", "<u4")], align=True
)
NOBODY, SEVERAL = 0xFFFF_FFFF, 0xFFFF_FFFE
FIELDS = "completion", "path", "refusal", "accepted", "effects"


def expected(v: fx.Vcpu, out: fx.Outcome, value: int) -> tuple:
    """A result as C has it, from the Outcome of the same exit of a vCPU."""
    status = Status.GP if out.fault else Status.USER if out.user is not None else Status.OK
    target = NOBODY if not v.targets else SEVERAL if len(v.targets) > 1 else v.targets[0].vcpu
    fixed = (out.fault or 0, 0 if out.user is None else out.user + 1, 0, status, v.index, target, value & 0xFF)
    return *(getattr(out, name) for name in FIELDS), *fixed


def main(path: str) -> int:
    """0 when nothing differs."""
    data = Path(path).read_bytes()
    n = int.from_bytes(data[:8], "little")
    records, at = np.frombuffer(data, RECORD, n, 8), 8 + n * RECORD.itemsize
    size = int.from_bytes(data[at : at + 8], "little")
    snapshot, pages = data[at + 8 : at + 8 + size], data[at + 8 + size :]

    m = fx.Machine(vcpus=2, kernel=fx.Machine.restore(snapshot).kernel)  # the C door's default
    m.boot_x2apic()
    for v in m.vcpus:
        v.wrmsr(0x808, 0)
    for i, record in enumerate(records):
        v = m.vcpus[i % 2]
        if i:
            before = records[i - 1]
            taken = Status.OK if v.hw_notify() else Status.NOTHING
            vectors = [NOBODY if vector is None else vector for vector in (v.ack(), v.eoi())]
            if [taken, *vectors] != [before["taken"], before["vector"], before["ended"]]:
                print(f"IPI {i - 1} was taken differently: {taken} {vectors}, in C {before}")
                return 1
        value, result = int(record["value"]), record["result"]
        ours = expected(v, v.wrmsr(0x830, value), value)
        theirs = (*(result[name] for name in FIELDS), *(result[f] for f in ("fault", "user", "value", "status")))
        theirs = (*theirs, *(result[name] for name in ("vcpu", "target", "vector")))
        if ours != theirs:
            print(f"IPI {i}, {value:#x}: {ours} in Python, {theirs} in C")
            return 1
    if m.snapshot() != snapshot:
        print("the machines' memory differs")
        return 1
    if b"".join(v.get_lapic() for v in m.vcpus) != pages:
        print("the LAPIC pages differ")
        return 1
    paths = np.bincount(records["result"]["path"], minlength=2)
    print(
        f"check: the Python door agrees on all {n} IPIs ({paths[1]} fast, {paths[0]} generic), memory and LAPIC pages"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
