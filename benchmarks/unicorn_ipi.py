"""Guest programs that send each other IPIs on emulated CPUs, with fastexit as their APICs.

    python benchmarks/unicorn_ipi.py               # 2 CPUs, then 4, in x2APIC mode
    python benchmarks/unicorn_ipi.py --xapic       # the same by the xAPIC page
    python benchmarks/unicorn_ipi.py --speed       # what the hook and an exit cost on this machine

Each CPU sends the next one an IPI and sleeps until it has had as many as it has sent. The guest counts in its memory,
the machine counts, and the host counts what went through the guest's IDT: all three have to agree. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import time
from typing import Any

import fastexit as fx

CODE, IDTR, IDT, MEMORY = 0x1000, 0x1800, 0x2000, 0x20000
CPUS, ROUNDS, HANDLED, SENT = 0x500, 0x508, 0x600, 0x700
VECTOR = 0x40

X2APIC = bytes.fromhex(
    # start
    "0f011c2500180000"  # 1000: lidt 0x1800
    "b91b000000"  # 1008: mov ecx,0x1b
    "0f32"  # 100d: rdmsr
    "0d000c0000"  # 100f: or eax,0xc00
    "0f30"  # 1014: wrmsr
    "b90f080000"  # 1016: mov ecx,0x80f
    "b8ff010000"  # 101b: mov eax,0x1ff
    "31d2"  # 1020: xor edx,edx
    "0f30"  # 1022: wrmsr
    "b902080000"  # 1024: mov ecx,0x802
    "0f32"  # 1029: rdmsr
    "89c3"  # 102b: mov ebx,eax
    # common
    "89dc"  # 102d: mov esp,ebx
    "c1e40c"  # 102f: shl esp,0xc
    "81c400900000"  # 1032: add esp,0x9000
    "8d7b01"  # 1038: lea edi,[rbx+0x1]
    "3b3c2500050000"  # 103b: cmp edi,0x500
    "7202"  # 1042: jb 1046 <common+0x19>
    "31ff"  # 1044: xor edi,edi
    "f0ff042510050000"  # 1046: lock inc 0x510
    "f390"  # 104e: pause
    "8b042510050000"  # 1050: mov eax,0x510
    "3b042500050000"  # 1057: cmp eax,0x500
    "72ee"  # 105e: jb 104e <common+0x21>
    "fb"  # 1060: sti
    # send
    "89fa"  # 1061: mov edx,edi
    "b840000000"  # 1063: mov eax,0x40
    "b930080000"  # 1068: mov ecx,0x830
    "0f30"  # 106d: wrmsr
    "48ff04dd00070000"  # 106f: inc [rbx*8+0x700]
    # wait
    "fa"  # 1077: cli
    "488b04dd00060000"  # 1078: mov rax,[rbx*8+0x600]
    "483b04dd00070000"  # 1080: cmp rax,[rbx*8+0x700]
    "7304"  # 1088: jae 108e <wait+0x17>
    "fb"  # 108a: sti
    "f4"  # 108b: hlt
    "ebe9"  # 108c: jmp 1077 <wait>
    "fb"  # 108e: sti
    "488b04dd00070000"  # 108f: mov rax,[rbx*8+0x700]
    "f390"  # 1097: pause
    "483904fd00060000"  # 1099: cmp [rdi*8+0x600],rax
    "72f4"  # 10a1: jb 1097 <wait+0x20>
    "483b042508050000"  # 10a3: cmp rax,0x508
    "72b4"  # 10ab: jb 1061 <send>
    "fa"  # 10ad: cli
    "f4"  # 10ae: hlt
    # handler
    "50"  # 10af: push rax
    "51"  # 10b0: push rcx
    "52"  # 10b1: push rdx
    "48ff04dd00060000"  # 10b2: inc [rbx*8+0x600]
    "b90b080000"  # 10ba: mov ecx,0x80b
    "31c0"  # 10bf: xor eax,eax
    "31d2"  # 10c1: xor edx,edx
    "0f30"  # 10c3: wrmsr
    "5a"  # 10c5: pop rdx
    "59"  # 10c6: pop rcx
    "58"  # 10c7: pop rax
    "48cf"  # 10c8: iretq
)
XAPIC = bytes.fromhex(
    # start
    "0f011c2500180000"  # 1000: lidt 0x1800
    "41bf0000e0fe"  # 1008: mov r15d,0xfee00000
    "41c787f0000000ff010000"  # 100e: mov [r15+0xf0],0x1ff
    "418b5f20"  # 1019: mov ebx,[r15+0x20]
    "c1eb18"  # 101d: shr ebx,0x18
    # common
    "89dc"  # 1020: mov esp,ebx
    "c1e40c"  # 1022: shl esp,0xc
    "81c400900000"  # 1025: add esp,0x9000
    "8d7b01"  # 102b: lea edi,[rbx+0x1]
    "3b3c2500050000"  # 102e: cmp edi,0x500
    "7202"  # 1035: jb 1039 <common+0x19>
    "31ff"  # 1037: xor edi,edi
    "4189fe"  # 1039: mov r14d,edi
    "c1e718"  # 103c: shl edi,0x18
    "f0ff042510050000"  # 103f: lock inc 0x510
    "f390"  # 1047: pause
    "8b042510050000"  # 1049: mov eax,0x510
    "3b042500050000"  # 1050: cmp eax,0x500
    "72ee"  # 1057: jb 1047 <common+0x27>
    "fb"  # 1059: sti
    # send
    "4189bf10030000"  # 105a: mov [r15+0x310],edi
    "41c7870003000040000000"  # 1061: mov [r15+0x300],0x40
    "48ff04dd00070000"  # 106c: inc [rbx*8+0x700]
    # wait
    "fa"  # 1074: cli
    "488b04dd00060000"  # 1075: mov rax,[rbx*8+0x600]
    "483b04dd00070000"  # 107d: cmp rax,[rbx*8+0x700]
    "7304"  # 1085: jae 108b <wait+0x17>
    "fb"  # 1087: sti
    "f4"  # 1088: hlt
    "ebe9"  # 1089: jmp 1074 <wait>
    "fb"  # 108b: sti
    "488b04dd00070000"  # 108c: mov rax,[rbx*8+0x700]
    "f390"  # 1094: pause
    "4a3904f500060000"  # 1096: cmp [r14*8+0x600],rax
    "72f4"  # 109e: jb 1094 <wait+0x20>
    "483b042508050000"  # 10a0: cmp rax,0x508
    "72b0"  # 10a8: jb 105a <send>
    "fa"  # 10aa: cli
    "f4"  # 10ab: hlt
    # handler
    "50"  # 10ac: push rax
    "48ff04dd00060000"  # 10ad: inc [rbx*8+0x600]
    "31c0"  # 10b5: xor eax,eax
    "418987b0000000"  # 10b7: mov [r15+0xb0],eax
    "58"  # 10be: pop rax
    "48cf"  # 10bf: iretq
)
HANDLER = {False: 0x10AF, True: 0x10AC}
"""Where each program's handler begins; ``start`` is the first byte."""


def build(cpus: int, rounds: int, *, xapic: bool = False, quantum: int = 1000, **machine: Any) -> Any:
    """A host whose CPUs are about to run the program."""
    from fastexit.adapters.unicorn import UnicornHost, idt

    host = UnicornHost(fx.Machine(vcpus=cpus, **machine), MEMORY, quantum=quantum)
    host.load(CODE, XAPIC if xapic else X2APIC)
    host.load(IDT, idt({VECTOR: HANDLER[xapic]}))
    host.load(IDTR, struct.pack("<HQ", 256 * 16 - 1, IDT))
    host.load(CPUS, struct.pack("<QQ", cpus, rounds))
    for cpu in host.cpus:
        cpu.start(CODE)
    return host


def words(host: Any, at: int) -> list[int]:
    """The guest's counters, one for each CPU."""
    return list(struct.unpack_from(f"<{len(host.cpus)}Q", host.memory, at))


def play(cpus: int, rounds: int, *, xapic: bool = False, **machine: Any) -> dict[str, Any]:
    """Run it to the end: a row for each CPU, and what does not agree."""
    host = build(cpus, rounds, xapic=xapic, **machine)
    began = time.perf_counter()
    ended = host.run(instructions=10_000 * rounds * cpus + 1_000_000)
    seconds = time.perf_counter() - began
    rows = [
        {
            "cpu": cpu.index,
            "sent": sent,
            "ipis": cpu.counters.ipis,
            "fast": cpu.counters.ipis_fast,
            "taken": cpu.counters.taken[VECTOR],
            "handled": handled,
            "instructions": cpu.instructions,
            "left": cpu.vcpu.pending() is not None,
        }
        for cpu, sent, handled in zip(host.cpus, words(host, SENT), words(host, HANDLED))
    ]
    wrong = [f"the run ended by {ended.value}"] if ended.value != "idle" else []
    for row in rows:
        if not row["sent"] == row["ipis"] == row["taken"] == row["handled"] == rounds or row["left"]:
            wrong.append(f"CPU {row['cpu']}: {row}")
    return {
        "cpus": cpus,
        "mode": "xAPIC" if xapic else "x2APIC",
        "kernel": host.machine.kernel,
        "lost": cpus * rounds - sum(row["handled"] for row in rows),
        "rows": rows,
        "seconds": seconds,
        "stops": sum(sum(cpu.counters.stops.values()) for cpu in host.cpus),
        "wrong": wrong,
    }


def speed() -> dict[str, float]:
    """Million instructions a second without hook, with Unicorn's counter and with ours; microseconds an IPI."""
    from unicorn import UC_ARCH_X86, UC_MODE_64, Uc, x86_const

    from fastexit.adapters.unicorn import UnicornHost

    loop = bytes.fromhex("48ffc0 48ffc3 4801d8 ffc1 85c9 75f2 f4")  # five instructions and a jump, n times; hlt
    n = 3_000_000

    def bare(turns: int, count: int) -> float:
        uc = Uc(UC_ARCH_X86, UC_MODE_64)
        uc.mem_map(0, 0x10000)
        uc.mem_write(CODE, loop)
        uc.reg_write(x86_const.UC_X86_REG_RCX, -turns & 0xFFFF_FFFF)
        began = time.perf_counter()
        uc.emu_start(CODE, 0, count=count)
        return 6 * turns / (time.perf_counter() - began) / 1e6

    host = UnicornHost(fx.Machine(vcpus=1), MEMORY, quantum=1_000_000)
    host.load(CODE, loop)
    host.cpus[0].start(CODE)
    host.cpus[0]["rcx"] = -n & 0xFFFF_FFFF
    began = time.perf_counter()
    host.run()
    hooked = 6 * n / (time.perf_counter() - began) / 1e6
    played = play(2, 3000)
    return {
        "Unicorn alone, M instructions/s": bare(10 * n, 0),
        "Unicorn that counts, M instructions/s": bare(n, 1 << 40),
        "this host, M instructions/s": hooked,
        "an IPI from WRMSR to EOI, us": played["seconds"] / 6000 * 1e6,
        "stops of Unicorn, a second": played["stops"] / played["seconds"],
    }


def show(results: list[dict[str, Any]]) -> None:
    """Tables, one for each number of CPUs."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for result in results:
        title = f"{result['cpus']} CPUs, {result['mode']}, kernel {result['kernel']}: {result['lost']} lost"
        table = Table(title=title, box=box.SIMPLE_HEAVY)
        for column in (
            "CPU",
            "IPIs sent",
            "by the fast path",
            "through the IDT",
            "counted by the guest",
            "instructions",
        ):
            table.add_column(column, justify="right")
        for row in result["rows"]:
            cells = ("cpu", "ipis", "fast", "taken", "handled", "instructions")
            table.add_row(*(f"{row[name]:,}" for name in cells))
        console.print(table)
        for line in result["wrong"]:
            console.print(line, style="red")


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 1 when counters disagree, 2 for what cannot be."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cpus", type=int, nargs="+", default=[2, 4], help="numbers of CPUs (default: 2 4)")
    parser.add_argument("--rounds", type=int, default=200, help="IPIs that each CPU sends (default: 200)")
    parser.add_argument("--xapic", action="store_true", help="by the xAPIC page instead of x2APIC MSRs")
    parser.add_argument("--kernel", default="6.18", help="the generation to be like (default: 6.18)")
    parser.add_argument("--json", action="store_true", help="results as JSON")
    parser.add_argument("--speed", action="store_true", help="measure instead")
    given = parser.parse_args(argv)
    try:
        if given.speed:
            figures = speed()
            print(json.dumps(figures) if given.json else "\n".join(f"{v:10,.1f}  {k}" for k, v in figures.items()))
            return 0
        if min(given.cpus) < 2 or max(given.cpus) > 16 or given.rounds < 1:
            raise ValueError("2 to 16 CPUs, at least one round")
        results = [play(n, given.rounds, xapic=given.xapic, kernel=given.kernel) for n in given.cpus]
    except (ImportError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps(results, indent=1))
    else:
        show(results)
    return int(any(result["wrong"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
