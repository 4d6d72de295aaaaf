"""Real guests: vCPUs on /dev/kvm without its irqchip, with fastexit for local APICs, IOAPIC, PICs and PIT."""

from fastexit.adapters.kvmhost.host import KvmHost
from fastexit.adapters.kvmhost.memory import Memory
from fastexit.adapters.kvmhost.modelled import ModelVcpu
from fastexit.adapters.kvmhost.power import Ended
from fastexit.adapters.kvmhost.registers import Start
from fastexit.adapters.kvmhost.summary import summary
from fastexit.adapters.kvmhost.vcpu import HostVcpu, KernelVcpu

__all__ = ["Ended", "HostVcpu", "KernelVcpu", "KvmHost", "Memory", "ModelVcpu", "Start", "summary"]
