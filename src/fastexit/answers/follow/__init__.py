"""From rows to facts: what a thread's lines say together, in one compiled pass.

One exit is a kvm_exit line and the kvm_entry line behind it; one ICR write is up to five lines, whose order differs by
kernel and by door; an interrupt is an accept line whose source stands before it (kvm_msi_set_irq, kvm_apic_ipi of the
generic path) or behind it (kvm_ioapic_set_irq, kvm_apic_ipi of 6.18's fast path), on the same thread. So each thread is
a lane that keeps what is open, each vCPU a place that keeps its interrupts, and a fact is written when it is complete.

Rows are 64 bytes, so they are read as eight words; so are facts (facts.FACT). Indices of lanes and places come from
the caller, who has checked them. Memory is that of lanes, places and POOL accept lines whose source is not known yet.
"""
