"""A guest of two CPUs on Unicorn: the first starts the second, sets a timer, and sleeps until its interrupt."""

import struct

import fastexit as fx
from fastexit.adapters.unicorn import UnicornHost, idt


def word(value):
    return struct.pack("<I", value)


def wrmsr(msr, low, high=0):  # mov ecx, msr; mov eax, low; mov edx, high; wrmsr
    return b"\xb9" + word(msr) + b"\xb8" + word(low) + b"\xba" + word(high) + b"\x0f\x30"


boot = (
    b"\x0f\x01\x1c\x25" + word(0x1800)  # lidt [0x1800]
    + wrmsr(0x1B, 0xFEE00D00)  # x2APIC mode; 0xD00 on the boot CPU, 0xC00 elsewhere
    + wrmsr(0x80F, 0x1FF)  # the APIC accepts interrupts
    + wrmsr(0x830, 0x4500, high=1)  # INIT to APIC id 1
    + wrmsr(0x830, 0x4608, high=1)  # SIPI: it begins at 0x8000
    + wrmsr(0x832, 0x40040)  # timer: TSC deadline, vector 0x40
    + wrmsr(0x6E0, 50_000)
    + b"\xfb\xf4\xfa\xf4"  # sti; hlt; cli; hlt
)  # fmt: skip
handler = b"\xff\x04\x25" + word(0x500) + wrmsr(0x80B, 0) + b"\x48\xcf"  # inc dword [0x500]; EOI; iretq
second = bytes.fromhex("ff060405 fa f4")  # 16-bit code: inc word [0x504]; cli; hlt

machine = fx.Machine(vcpus=2)  # kernel=, vendor=, apicv=, ... as anywhere
host = UnicornHost(machine, memory=1 << 20)
host.load(0x1000, boot)
host.load(0x1200, handler)
host.load(0x1800, struct.pack("<HQ", 4095, 0x2000))  # what LIDT reads
host.load(0x2000, idt({0x40: 0x1200}))  # vector -> handler, in the code segment 0x08
host.load(0x8000, second)
host.cpus[0].start(0x1000, rsp=0x9000)  # 64-bit mode; the others wait for INIT and SIPI
print(host.run(instructions=1_000_000))  # Ended.IDLE: all CPUs sleep for good
print(host.memory[0x500], host.memory[0x504], machine.time, host.cpus)
print(host.cpus[0].registers, host.cpus[0].counters)
