"""What MSRs are called: those that guests of KVM write, after Intel's SDM, AMD's APM, KVM's and Hyper-V's lists."""

from __future__ import annotations

from fastexit import hyperv as HV
from fastexit import regs as R

_ARCHITECTURAL = {
    0x10: "TSC",
    0x17: "PLATFORM_ID",
    0x1B: "APIC_BASE",
    0x34: "SMI_COUNT",
    0x3A: "FEATURE_CONTROL",
    0x3B: "TSC_ADJUST",
    0x48: "SPEC_CTRL",
    0x49: "PRED_CMD",
    0x79: "UCODE_WRITE",
    0x8B: "UCODE_REV",
    0x9E: "SMBASE",
    0xC1: "PMC0",
    0xC2: "PMC1",
    0xCD: "FSB_FREQ",
    0xCE: "PLATFORM_INFO",
    0xE2: "PKG_CST_CONFIG_CONTROL",
    0xE7: "MPERF",
    0xE8: "APERF",
    0xFE: "MTRRcap",
    0x10A: "ARCH_CAPABILITIES",
    0x10B: "FLUSH_CMD",
    0x11E: "BBL_CR_CTL3",
    0x122: "TSX_CTRL",
    0x140: "MISC_FEATURES_ENABLES",
    0x174: "SYSENTER_CS",
    0x175: "SYSENTER_ESP",
    0x176: "SYSENTER_EIP",
    0x179: "MCG_CAP",
    0x17A: "MCG_STATUS",
    0x186: "PERFEVTSEL0",
    0x187: "PERFEVTSEL1",
    0x198: "PERF_STATUS",
    0x199: "PERF_CTL",
    0x19A: "THERM_CONTROL",
    0x19B: "THERM_INTERRUPT",
    0x19C: "THERM_STATUS",
    0x1A0: "MISC_ENABLE",
    0x1A2: "TEMPERATURE_TARGET",
    0x1AD: "TURBO_RATIO_LIMIT",
    0x1B0: "ENERGY_PERF_BIAS",
    0x1C4: "XFD",
    0x1C5: "XFD_ERR",
    0x1D9: "DEBUGCTL",
    0x1FC: "POWER_CTL",
    0x250: "MTRRfix64K_00000",
    0x258: "MTRRfix16K_80000",
    0x259: "MTRRfix16K_A0000",
    0x277: "PAT",
    0x2FF: "MTRRdefType",
    0x309: "FIXED_CTR0",
    0x30A: "FIXED_CTR1",
    0x30B: "FIXED_CTR2",
    0x345: "PERF_CAPABILITIES",
    0x38D: "FIXED_CTR_CTRL",
    0x38E: "PERF_GLOBAL_STATUS",
    0x38F: "PERF_GLOBAL_CTRL",
    0x390: "PERF_GLOBAL_OVF_CTRL",
    0x606: "RAPL_POWER_UNIT",
    0x610: "PKG_POWER_LIMIT",
    0x611: "PKG_ENERGY_STATUS",
    0x64E: "PPERF",
    0x6E0: "TSC_DEADLINE",
    0xDA0: "XSS",
    0xC0000080: "EFER",
    0xC0000081: "STAR",
    0xC0000082: "LSTAR",
    0xC0000083: "CSTAR",
    0xC0000084: "SYSCALL_MASK",
    0xC0000100: "FS_BASE",
    0xC0000101: "GS_BASE",
    0xC0000102: "KERNEL_GS_BASE",
    0xC0000103: "TSC_AUX",
    0xC0000104: "AMD64_TSC_RATIO",
    0xC0010010: "SYSCFG",
    0xC0010015: "HWCR",
    0xC001001F: "NB_CFG",
    0xC0010055: "INT_PENDING_MSG",
    0xC0010114: "VM_CR",
    0xC0010117: "VM_HSAVE_PA",
    0xC001011F: "VIRT_SPEC_CTRL",
    0xC0011020: "LS_CFG",
    0xC0011022: "DC_CFG",
    0xC0011029: "DE_CFG",
    0xC001102A: "BU_CFG2",
    0xC001102C: "EX_CFG",
}
_KVM = {
    0x11: "KVM_WALL_CLOCK",
    0x12: "KVM_SYSTEM_TIME",
    0x4B564D00: "KVM_WALL_CLOCK_NEW",
    0x4B564D01: "KVM_SYSTEM_TIME_NEW",
    0x4B564D02: "KVM_ASYNC_PF_EN",
    0x4B564D03: "KVM_STEAL_TIME",
    R.MSR_KVM_PV_EOI_EN: "KVM_PV_EOI_EN",
    0x4B564D05: "KVM_POLL_CONTROL",
    0x4B564D06: "KVM_ASYNC_PF_INT",
    0x4B564D07: "KVM_ASYNC_PF_ACK",
    0x4B564D08: "KVM_MIGRATION_CONTROL",
}
_HYPERV = {
    number: name.removeprefix("MSR_")
    for name, number in vars(HV).items()
    if name.startswith("MSR_HV_") and isinstance(number, int) and name not in ("MSR_HV_FIRST", "MSR_HV_LAST")
}
_X2APIC = {
    R.MSR_X2APIC_BASE + (value >> 4): f"X2APIC_{name.removeprefix('APIC_')}"
    for name, value in vars(R).items()
    if name in ("APIC_ID", "APIC_LVR", "APIC_TASKPRI", "APIC_PROCPRI", "APIC_EOI", "APIC_LDR", "APIC_SPIV", "APIC_ESR",
                "APIC_ICR", "APIC_LVTT", "APIC_LVTTHMR", "APIC_LVTPC", "APIC_LVT0", "APIC_LVT1", "APIC_LVTERR",
                "APIC_TMICT", "APIC_TMCCT", "APIC_TDCR", "APIC_SELF_IPI")
}  # fmt: skip
NAMES: dict[int, str] = {**_ARCHITECTURAL, **_KVM, **_HYPERV, **_X2APIC}
_FAMILIES = (
    (0x200, 0x20F, "MTRRphys"),
    (0x268, 0x26F, "MTRRfix4K"),
    (0x280, 0x29F, "MC_CTL2"),
    (0x400, 0x47F, "MC bank"),
    (0x480, 0x493, "VMX capability"),
    (0x4C1, 0x4C8, "PMC, full width"),
    (0x680, 0x6DF, "LBR"),
    (0x800, 0x8FF, "X2APIC"),
    (HV.MSR_HV_SINT0, HV.MSR_HV_SINT15, "HV_SINT"),
    (HV.MSR_HV_STIMER0_CONFIG, HV.MSR_HV_STIMER3_COUNT, "HV_STIMER"),
    (0xC0010000, 0xC0010007, "K7_EVNTSEL or PERFCTR"),
    (0xC0010200, 0xC001020B, "F15H_PERF"),
)


def msr_name(msr: int) -> str:
    """An MSR's name, "" where none is known here.

    >>> msr_name(0x6E0), msr_name(0x830), msr_name(0x40000071), msr_name(0x40000093)
    ('TSC_DEADLINE', 'X2APIC_ICR', 'HV_ICR', 'HV_SINT3')
    """
    if msr in NAMES and not HV.MSR_HV_SINT0 <= msr <= HV.MSR_HV_STIMER3_COUNT:
        return NAMES[msr]
    for first, last, name in _FAMILIES:
        if first <= msr <= last:
            if name == "HV_STIMER":
                return f"HV_STIMER{msr - first >> 1}_{'COUNT' if msr - first & 1 else 'CONFIG'}"
            return f"{name}{msr - first}" if name == "HV_SINT" else name
    return ""
