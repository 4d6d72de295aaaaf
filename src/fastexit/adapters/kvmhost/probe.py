"""Whether this KVM lets user space see a guest's writes to IA32_TSC_DEADLINE, though it has no irqchip.

Models: nothing. The fast path of kvm_intel, and of later kvm_amd, handles that MSR before anybody asks the MSR filter;
without an in-kernel APIC it then does nothing, and a guest would wait for its timer for ever.
"""

from __future__ import annotations

from fastexit import regs as R
from fastexit.adapters.kvmhost.memory import LEAST, Memory
from fastexit.adapters.kvmhost.registers import Registers, Start, descriptors
from fastexit.adapters.kvmhost.vm import Vm
from fastexit.kvm import ioctl as K
from fastexit.kvm.device import Device
from fastexit.reasons import KvmExit

AT, PORT = 0x1_0000, 0x80
CODE = b"\xb9" + R.MSR_TSC_DEADLINE.to_bytes(4, "little") + b"\x31\xc0\x31\xd2\x0f\x30\xe6" + bytes([PORT]) + b"\xf4"
"""MOV ECX, IA32_TSC_DEADLINE; XOR EAX, EAX; XOR EDX, EDX; WRMSR; OUT PORT, AL; HLT."""
DEADLINE = 1 << 24


def sees_deadlines(device: Device) -> bool:
    """By a guest of three instructions; False where it cannot be found out."""
    memory = Memory(LEAST)
    vm = Vm(memory, in_kernel=False, device=device)
    try:
        table = K.ffi.new("struct cpuid_table *", {"nent": 1})
        table.entries[0].function, table.entries[0].ecx = 1, DEADLINE
        fd, run = vm.vcpu(0)
        K.call(fd, K.SET_CPUID2, table)
        memory.write(AT, CODE)
        descriptors(memory, 32)
        Registers(fd).begin(Start(32, AT), R.APIC_DEFAULT_PHYS_BASE | R.APICBASE_EN)
        K.call(fd, K.RUN)
        return int(run.exit_reason) == KvmExit.X86_WRMSR
    except OSError:
        return False
    finally:
        vm.close()
