"""The calls as symbols and as methods of C++: written from the table, and the same functions."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import cffi
import pytest

from embedded import Door, built, compiled, declared, run_host
from fastexit.embed import build, cabi, calls

HOOKED = """
#include <fastexit.hpp>
#include <type_traits>

struct Host {
    uint32_t notified = 99;
    void notify(uint32_t vcpu) { notified = vcpu; }
    void kick(uint32_t) {}
};

int main()
{
    Host host;
    fastexit::Hooks hooks(host);
    fastexit::Machine machine, other;
    fastexit::Result result;

    static_assert(!std::is_copy_constructible_v<fastexit::Machine>);
    static_assert(std::is_nothrow_move_assignable_v<fastexit::Machine>);
    if (!hooks.kick || hooks.wake || hooks.doorbell)
        return 1;
    auto status = fastexit::Machine::open(fastexit::Config(0), machine);
    if (!status.error() || status != FX_E_RANGE || machine)
        return 2;
    if (!fastexit::Machine::open(fastexit::Config(2).flags(FX_BOOT_X2APIC), machine, &hooks))
        return 3;
    for (uint32_t v = 0; v < 2; v++)
        if (!machine.wrmsr(v, 0x808, 0, result))
            return 4;
    if (!machine.wrmsr(0, 0x830, 1ull << 32 | 0x41, result) || host.notified != 1 || result.target != 1)
        return 5;
    if (machine.targets(0).size() != 1 || machine.targets(0)[0].effects != FX_NOTIFY || !machine.notify(1))
        return 6;
    if (machine.pending(1) != 0x41u || machine.ack(1) != 0x41u || machine.ack(1) || machine.eoi(1) != 0x41u)
        return 7;
    other = std::move(machine);
    if (machine || !other || machine.notify(0) != FX_E_NULL)
        return 8;
    auto bytes = other.snapshot();
    if (bytes.empty() || !fastexit::Machine::restore(bytes, machine) || machine.snapshot() != bytes)
        return 9;
    bytes.pop_back();
    if (fastexit::Machine::restore(bytes, machine) != FX_E_SNAPSHOT || machine || !machine.snapshot().empty())
        return 10;
    return 0;
}
"""


def test_written_files_are_what_the_table_says() -> None:
    """python -m fastexit.embed.calls has been run since fastexit.h was changed."""
    for name, make in calls.FILES.items():
        assert (cabi.NATIVE / name).read_text() == make(), f"{name}: python -m fastexit.embed.calls"
    assert [call.name for call in calls.calls()] == [
        name for name, _ in declared().typeof("struct fx_ops").fields if name not in ("size", "abi")
    ]


@compiled
def test_symbols_are_the_table(door: Door) -> None:
    """Each call is exported, and the table has the same function."""
    parser = cffi.FFI()
    parser.cdef("".join(cabi.declarations(name) for name in (*cabi.HEADERS, "fastexit_calls.h")))
    library = parser.dlopen(str(built() / build.LIBRARY))
    m = door.open()  # the table is filled in now
    assert door.fx.close(m) == 0
    for call in calls.calls():
        exported = int(parser.cast("uintptr_t", parser.addressof(library, f"fx_{call.name}")))
        field = getattr(door.fx, call.name)
        assert exported == int(door.ffi.cast("uintptr_t", field)), call.name
        assert parser.typeof(parser.addressof(library, f"fx_{call.name}")).cname == door.ffi.typeof(field).cname


@compiled
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@pytest.mark.parametrize("standard", ["c++17", "c++20"])
def test_cpp(compiler: str, standard: str, tmp_path: Path) -> None:
    """fastexit.hpp compiles without a warning and without exceptions, and its machine does what it says."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    place = built()
    (tmp_path / "hooked.cpp").write_text(HOOKED)
    warnings = "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror"
    line = [compiler, f"-std={standard}", *warnings, "-fno-exceptions", "-fno-rtti", f"-I{place}", "hooked.cpp"]
    line += [f"-L{place}", f"-Wl,-rpath,{place}", "-lfastexit", "-o", "hooked"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert run_host(tmp_path / "hooked").returncode == 0
