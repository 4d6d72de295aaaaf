"""What a machine is made of: user space's choices, checked as KVM would check them, as words of the machine's header.

Models: the capabilities that must be set before the first vCPU (KVM_CAP_X2APIC_API, X86_DISABLE_EXITS,
X86_APIC_BUS_CYCLES_NS, DISABLE_QUIRKS, SPLIT_IRQCHIP), KVM's module parameters, what the guest's CPUID offers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from fastexit import layout as L
from fastexit import offers
from fastexit import regs as R
from fastexit.checks import U64, integer, one_of, quoted
from fastexit.hyperv import ALL_FEATURES, HvFeature
from fastexit.irqchip import created
from fastexit.profile import SDM, Profile, named, numbered
from fastexit.releases import generation, has_fast_path, release
from fastexit.settings import SETTINGS, Settings
from fastexit.traits import HYPERV, RULES

_MAX_CLOCK = (1 << 63) - 1


def header(settings: Settings) -> dict[int, int]:
    """Header words of a machine with these settings. ValueError for what KVM or the hardware would refuse."""
    chosen: dict[str, Any] = {name: setting.default for name, setting in SETTINGS.items()} | dict(settings)
    _check(chosen)
    if chosen["kernel"] == SDM.name:
        _follow_the_manual(chosen)
    svm = chosen["vendor"] == "svm"
    if chosen["hv_timer"] is None:
        chosen["hv_timer"] = not svm
    if chosen["ipiv"] is None:
        chosen["ipiv"] = svm and chosen["apicv"]
    bits = L.CONFIG_FASTPATH
    for name, setting in SETTINGS.items():
        if chosen[name] == setting.choices[1] if setting.choices else chosen[name]:
            bits |= setting.bit
    for quirk, bit in (
        (R.QUIRK_LINT0_REENABLED, L.CONFIG_LINT0_REENABLED),
        (R.QUIRK_LAPIC_MMIO_HOLE, L.CONFIG_MMIO_HOLE),
    ):
        if not chosen["disable_quirks"] & quirk:
            bits |= bit
    if chosen["hyperv"] == "enforce":
        bits |= L.CONFIG_HYPERV_ENFORCE
    kernel = chosen["kernel"]
    known = generation(kernel)
    if not has_fast_path(kernel):
        bits &= ~L.CONFIG_FASTPATH
    return {
        L.H_MAGIC: L.MAGIC,
        L.H_ABI: L.ABI_VERSION,
        L.H_WORDS: L.WORDS,
        L.H_CONFIG: bits,
        L.H_TRAITS: known.traits & U64,
        L.H_RULES: known.traits >> RULES & U64,
        L.H_HYPERV_RULES: known.traits >> HYPERV,
        L.H_API: chosen["x2apic_api"],
        L.H_MAP: L.MAP0,
        L.H_PROFILE: known.number,
        L.H_MAXPHYADDR: chosen["maxphyaddr"],
        L.H_TSC_KHZ: chosen["tsc_khz"],
        L.H_BUS_NS: chosen["bus_cycle_ns"],
        L.H_MIN_PERIOD_NS: chosen["min_timer_period_us"] * 1000,
        L.H_TIMER_ADVANCE_NS: chosen["timer_advance_ns"],
        L.H_DISABLED_EXITS: chosen["disable_exits"],
        L.H_BSP_ID: chosen["boot_cpu_id"],
        L.H_HV_FEATURES: int(hyperv_features(chosen["hyperv_features"])),
        L.H_HV_VP_INDICES: offers.room(kernel).vcpus,
        L.H_INHIBITS: 0 if chosen["apicv"] else 1 << R.Inhibit.DISABLED,
        **created(chosen["irqchip"]),
        **({} if kernel in named() else release_words(kernel)),
    }


def _follow_the_manual(chosen: dict[str, Any]) -> None:
    """What KVM deviates in and user space may switch off is off: quirks, 8-bit broadcasts, the shortest period."""
    chosen["disable_quirks"] |= R.QUIRK_LINT0_REENABLED | R.QUIRK_LAPIC_MMIO_HOLE
    chosen["x2apic_api"] |= R.X2API_32BIT_IDS | R.X2API_NO_BROADCAST_QUIRK
    if chosen["min_timer_period_us"] == SETTINGS["min_timer_period_us"].default:
        chosen["min_timer_period_us"] = 0


def release_words(release: str) -> dict[int, int]:
    """The header words that keep the text of a release."""
    text = release.removeprefix("v").encode("ascii").ljust(8 * L.RELEASE_WORDS, b"\0")
    return {L.H_RELEASE + n: int.from_bytes(text[8 * n : 8 * n + 8], "little") for n in range(L.RELEASE_WORDS)}


def release_of(words: np.ndarray) -> str:
    """The release that a machine's header names, or nothing. ValueError for bytes that are none."""
    text = words[L.H_RELEASE : L.H_RELEASE + L.RELEASE_WORDS].tobytes().rstrip(b"\0").decode("latin-1")
    if text and release(text) is None:
        raise ValueError(f"{quoted(text)} is no kernel release")
    return text


def profile_of(words: np.ndarray) -> Profile:
    """The generation of a machine's header, with the traits of the release that it names. ValueError for none."""
    known, text = numbered(int(words[L.H_PROFILE])), release_of(words)
    if not text:
        return known
    found = generation(text)
    if found.number != known.number:
        raise ValueError(f"kernel release {text} is not of generation {known.name}")
    return found


def _check(chosen: dict[str, Any]) -> None:
    generation(chosen["kernel"])
    for name, setting in SETTINGS.items():
        if setting.choices:
            one_of(chosen[name], name, setting.choices)
    check_api(chosen["x2apic_api"], chosen["irqchip"])
    if chosen["hyperv"] != "enforce" and type(chosen["hyperv"]) is not bool:
        raise ValueError(f"hyperv is {quoted(chosen['hyperv'])}: True, False or 'enforce'")
    if chosen["hyperv"] and not chosen["kvm_hyperv"]:
        raise ValueError(f"hyperv={chosen['hyperv']!r}: needs kvm_hyperv=True")
    offers.check(chosen)
    for name, vendor, why in (
        ("hv_timer", "vmx", "SVM has no preemption timer"),
        ("vtd_pi", "vmx", "VT-d posts to VMX's descriptors"),
        ("x2avic", "svm", "x2AVIC is SVM's"),
    ):
        if chosen[name] and chosen["vendor"] != vendor:
            raise ValueError(f"{name}=True: {why}")
    for name in ("ipiv", "vtd_pi", "x2avic"):
        if chosen[name] and not chosen["apicv"]:
            raise ValueError(f"{name}=True: needs apicv=True")
    for name, setting in SETTINGS.items():
        if setting.limits:
            least, most = setting.limits
            if not least <= integer(chosen[name], name, max(most, 63)) <= most:
                raise ValueError(f"{name} {chosen[name]} is out of range {least}..{most}")


def hyperv_features(given: Any) -> HvFeature:
    """Enlightenments as flags, from flags or names. ValueError or TypeError for what is none."""
    if isinstance(given, int):
        return HvFeature(integer(given, "hyperv_features", int(ALL_FEATURES)))
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"hyperv_features is {type(given).__name__}, neither hyperv.HvFeature nor a list of names")
    found = HvFeature(0)
    for name in given:
        feature = name if isinstance(name, HvFeature) else _BY_NAME.get(str(name).upper().replace("-", "_"))
        if feature is None:
            raise ValueError(f"hyperv_features: {quoted(name)} is none of {', '.join(_BY_NAME).lower()}")
        found |= feature
    return found


_BY_NAME: dict[str, HvFeature] = dict(HvFeature.__members__)


def latest_clock(tsc_khz: int) -> int:
    """The last ns that a machine's clock may be set to: it and the guest's TSC then have 63 bits.

    Above, a timer's deadline could lie before the TSC that it is counted from.
    """
    return min(_MAX_CLOCK, _MAX_CLOCK * 1_000_000 // tsc_khz)


def check_api(flags: int, irqchip: str) -> None:
    """What KVM_ENABLE_CAP of KVM_CAP_X2APIC_API would refuse."""
    flags = R.X2ApicApi(integer(flags, "x2apic_api", 15))
    enable, disable = R.X2ApicApi.ENABLE_SUPPRESS_EOI_BROADCAST, R.X2ApicApi.DISABLE_SUPPRESS_EOI_BROADCAST
    if enable in flags and (irqchip != "split" or disable in flags):
        raise ValueError(
            "x2apic_api: ENABLE_SUPPRESS_EOI_BROADCAST needs a split irqchip and excludes DISABLE (EINVAL)"
        )
