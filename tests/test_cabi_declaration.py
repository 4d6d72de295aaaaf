"""The C door's declarations: native/fastexit.h is the source; dtypes, enums, entries and keywords are the same."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import cffi
import numpy as np
import pytest

import fastexit as fx
from embedded import NOBODY, SEVERAL, declared
from fastexit import hyperv, outcome, reasons
from fastexit import layout as L
from fastexit import regs as R
from fastexit.embed import cabi
from fastexit.embed.cabi import Open, Status
from fastexit.jit import declare
from fastexit.profile import named
from fastexit.settings import SETTINGS
from generations import ON_TRIAL


def constants(prefix: str) -> dict[str, int]:
    ffi = declared()
    names = re.findall(rf"\b{prefix}(\w+) (?:= |0x)", (cabi.NATIVE / "fastexit.h").read_text())
    return {name: getattr(ffi.dlopen(None), prefix + name) for name in names}


def test_native_is_the_single_source() -> None:
    """What a wheel packs and what a checkout shows are the same bytes."""
    native = Path(__file__).parents[1] / "native"
    assert set(cabi.SOURCES) == {path.name for path in native.glob("*.[ch]*")} - {"lower_bound.c"}
    for name in cabi.SOURCES:
        assert (native / name).read_bytes() == (cabi.NATIVE / name).read_bytes()


@pytest.mark.parametrize(
    ("struct", "dtype"),
    [
        ("fx_config", cabi.CONFIG),
        ("fx_result", cabi.RESULT),
        ("fx_exit", L.EXIT),
        ("fx_outcome", L.OUTCOME),
    ],
)
def test_struct_is_dtype(struct: str, dtype: np.dtype) -> None:
    """Same fields in the same order and places, of the same size and sign."""
    ffi = declared()
    fields = ffi.typeof(f"struct {struct}").fields
    assert ffi.sizeof(f"struct {struct}") == dtype.itemsize
    assert [name for name, _ in fields] == [name for name in dtype.names if name != "code"]
    for name, field in fields:
        kind, offset = dtype.fields[name]
        assert (field.offset, ffi.sizeof(field.type)) == (offset, kind.itemsize), name
        if field.type.kind == "primitive":
            assert field.type.cname == f"{'u' if kind.kind == 'u' else ''}int{kind.itemsize * 8}_t", name


@pytest.mark.parametrize("struct", ["fx_config", "fx_hooks", "fx_ops"])
def test_size_and_abi_come_first(struct: str) -> None:
    fields = declared().typeof(f"struct {struct}").fields
    assert [(name, field.offset) for name, field in fields[:2]] == [("size", 0), ("abi", 4)]


def test_result_is_an_outcome_code() -> None:
    """The first eight bytes of a result are those of the code, which the shim copies in one piece."""
    for name in ("completion", "path", "fault", "refusal", "accepted", "user"):
        assert cabi.RESULT.fields[name][1] * 8 == outcome.CODE.shift(name.upper())
    assert cabi.RESULT.fields["effects"][1] * 8 == outcome.CODE.shift("EFFECTS")


def test_statuses_and_flags() -> None:
    assert {name: value for name, value in constants("FX_").items() if name in Status.__members__} == {
        status.name: status.value for status in Status
    }
    assert constants("FX_").items() >= {flag.name: flag.value for flag in Open}.items()
    text = (cabi.NATIVE / "fastexit.h").read_text()
    flags = text[text.index("/* fx_config.flags */") :].partition("};")[0]
    assert set(re.findall(r"FX_(\w+) = ", flags)) == set(Open.__members__)


def test_numbers_are_written_out() -> None:
    """An enumerator without a number would get another one when a line is put in before it."""
    text = re.sub(r"/\*.*?\*/", "", "".join(map(cabi.declarations, (*cabi.HEADERS, cabi.SHIM))), flags=re.DOTALL)
    enums = re.findall(r"enum\s*\w*\s*\{(.*?)\}", text, flags=re.DOTALL)
    enumerators = [line.strip() for body in enums for line in body.split(",") if line.strip()]
    assert len(enumerators) > 100
    assert [
        line for line in enumerators if not re.fullmatch(r"FXP?_\w+ = (-?\d+|0x[0-9a-fA-F]+u?|1 << \d+)", line)
    ] == []


def test_enums_are_pythons() -> None:
    known = constants("FX_")
    numbers = {name: row.number + 1 for name, row in named().items() if name not in ON_TRIAL}
    kernels = {f"KERNEL_{name.upper().replace('.', '_').replace('-', '_')}": n for name, n in numbers.items()}
    assert {name: n for name, n in known.items() if name.startswith("KERNEL_")} == {"KERNEL_DEFAULT": 0} | kernels
    assert {name: known[f"HVF_{name}"] for name in hyperv.HvFeature.__members__} == dict(hyperv.HvFeature.__members__)
    assert known["HVF_NONE"] == cabi.HVF_NONE > hyperv.ALL_FEATURES
    assert {name: known[f"HV_EXIT_{name}"] for name in hyperv.HvExit.__members__} == dict(hyperv.HvExit.__members__)
    assert [known["VMX"], known["SVM"]] == [cabi.VENDORS.index("vmx"), cabi.VENDORS.index("svm")]
    assert {name: known[name] for name in fx.Effect.__members__ if name != "NONE"} == {
        e.name: e.value for e in fx.Effect if e
    }
    assert all(known[path.name] == path.value for path in fx.Path)
    assert all(known[f"COMPLETION_{name.name}"] == name.value for name in fx.Fastpath)
    assert known["NOBODY"] == known["ALL"] == NOBODY
    assert known["SEVERAL"] == SEVERAL


def shim() -> cffi.FFI:
    parser = cffi.FFI()
    parser.cdef("".join(cabi.declarations(name) for name in (*cabi.HEADERS, cabi.SHIM)))
    return parser


def test_shims_numbers_are_pythons() -> None:
    lib = shim().dlopen(None)
    for name in re.findall(r"FXP_(\w+) = ", cabi.declarations(cabi.SHIM)):
        vendor, _, reason = name.partition("_")
        numbers = {"VMX": reasons.VmxExit, "SVM": reasons.SvmExit}.get(vendor)
        known = hyperv if name.startswith("MSR_HV_") else R
        assert getattr(lib, f"FXP_{name}") == (numbers[reason] if numbers else getattr(known, name)), name


def test_shims_code_masks_are_pythons() -> None:
    text = "".join((cabi.NATIVE / name).read_text() for name in cabi.SOURCES)
    for name in ("FAULT", "USER", "EFFECTS", "BLOCKED"):
        value = int(re.search(rf"#define CODE_{name} (0x\w+)ull", text)[1], 16)  # type: ignore[index]
        assert value == outcome.CODE.mask(name), name
    for name in ("TARGETS_VCPU", "TARGETS_EFFECT_SHIFT", "TARGETS_COUNT_SHIFT"):
        assert int(re.search(rf"#define {name} (\w+?)u?\n", text)[1], 0) == getattr(outcome, name)  # type: ignore[index]
    for name, value in (("MMIO_WRITE", L.MMIO_WRITE), ("VMX_IO_IN", R.VMX_IO_IN), ("SVM_IO_IN", R.SVM_IO_IN)):
        assert 1 << int(re.search(rf"#define {name} \(1u << (\d+)\)", text)[1]) == value  # type: ignore[index]


def test_table_is_the_entries() -> None:
    """The table's fields are cabi.ENTRIES in order, and each takes what its kernel takes: 64-bit integers."""
    from fastexit.jit.emit import parse

    ffi = shim()
    fields = ffi.typeof("struct fxp_table").fields[2:]
    assert [name for name, _ in fields] == list(cabi.ENTRIES)
    assert ffi.sizeof("struct fxp_table") == 8 + 8 * len(cabi.ENTRIES)
    for name, field in fields:
        function = field.type
        args, result = parse(declare.ENTRIES[name].signature)
        assert {str(kind) for kind in (*args, result)} == {"uint64"}, name
        assert [kind.cname for kind in (*function.args, function.result)] == ["uint64_t"] * (len(args) + 1), name


def test_every_setting_of_a_machine_can_be_said_in_c() -> None:
    """A struct of zeros is a machine of defaults; every flag is a setting's, every number a field of the struct."""
    zeros = dict.fromkeys(cabi.CONFIG.names, 0)
    assert cabi.keywords(SimpleNamespace(**zeros)) == {"vendor": "vmx"}
    flags = [flag for setting in SETTINGS.values() for flag in setting.flags]
    assert sorted([*flags, "BOOT_X2APIC", "QUIET"]) == sorted(Open.__members__)
    said: list[tuple[dict[str, int], dict[str, object]]] = [
        ({"kernel": 1}, {"kernel": "seed-v3"}),
        ({"hv_features": hyperv.HvFeature.SYNIC}, {"hyperv_features": hyperv.HvFeature.SYNIC}),
        ({"hv_features": cabi.HVF_NONE}, {"hyperv_features": hyperv.HvFeature(0)}),
    ]
    for name, setting in SETTINGS.items():
        said += [({"flags": Open[flag]}, {name: value}) for flag, value in setting.flags.items()]
        if type(setting.default) is int:
            said.append(({name: 7}, {name: 7}))
    for fields, settings in said:
        assert cabi.keywords(SimpleNamespace(**zeros | fields)) == {"vendor": "vmx"} | settings
    assert {name for _, settings in said for name in settings} | {"vendor"} == SETTINGS.keys()
    assert cabi.keywords(SimpleNamespace(**zeros | {"vendor": 1})) == {"vendor": "svm"}


def test_ipiv_counts_where_both_flags_are_set() -> None:
    """FX_IPIV has always won over FX_NO_IPIV."""
    zeros = dict.fromkeys(cabi.CONFIG.names, 0)
    assert cabi.keywords(SimpleNamespace(**zeros | {"flags": Open.IPIV | Open.NO_IPIV}))["ipiv"] is True
