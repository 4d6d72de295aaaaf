"""The command line: what it prints, as tables and JSON, and how it says no."""

from __future__ import annotations

import argparse
import json
import lzma
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fastexit as fx
from fastexit.cli import commands, main
from fastexit.insight.compare import Comparison
from fastexit.trace import BUNDLED

TRACES = Path(__file__).parents[1] / "examples" / "traces"
HEAD = 6000
"""Lines of a bundled trace that are enough to see IPIs, and few enough for interpreted kernels."""


@pytest.fixture(scope="module")
def small_trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import gzip

    path = tmp_path_factory.mktemp("trace") / "small.txt"
    with gzip.open(TRACES / "synthetic-guest-4vcpu.txt.gz", "rt") as source:
        path.write_text("".join(line for _, line in zip(range(HEAD), source, strict=False)))
    return path


def run_json(capsys: pytest.CaptureFixture[str], *args: str) -> dict:
    assert main([*args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line on stderr of a command that ends with exit code 2."""
    try:
        code = main(list(args))
    except SystemExit as stop:  # argparse
        code = stop.code
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    lines = [line for line in said.err.splitlines() if not line.startswith((" ", "usage:"))]
    assert len(lines) == 1, said.err
    assert "Traceback" not in said.err
    return lines[0]


def test_walk_puts_two_generations_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    walks = run_json(capsys, "walk")["walks"]
    assert [w["kernel"] for w in walks] == ["seed-v3", fx.profiles()[-1]]
    seed, new = walks
    assert (seed["ipi_left_in_step"], new["ipi_left_in_step"]) == ("14", "11")
    assert {"13", "15", "17", "20"} <= set(new["steps_not_reached"])
    assert "17" not in seed["steps_not_reached"]
    assert seed["steps_before_ipi"] > new["steps_before_ipi"]


def test_walk_shows_the_generic_path_too(capsys: pytest.CaptureFixture[str]) -> None:
    walks = run_json(capsys, "walk", "--kernels", "6.18", "--generic")["walks"]
    assert [w["fastpath"] for w in walks] == [True, False]
    assert walks[1]["ipi_left_in_step"] == "20"


def test_walk_tells_why_the_fast_path_declined(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["walk", "--shorthand", "all-but-self", "--kernels", "6.18"]) == 0
    out = capsys.readouterr().out
    assert "fast path declined: destination shorthand" in out
    assert "IPI left in step 20" in " ".join(out.split())


def test_walk_of_a_faulting_write(capsys: pytest.CaptureFixture[str]) -> None:
    (walk,) = run_json(capsys, "walk", "--value", "0x2000", "--kernels", "6.18")["walks"]
    assert walk["outcome"]["fault"] == "GP"
    assert walk["ipi_left_in_step"] is None


def test_walk_on_svm_without_avic(capsys: pytest.CaptureFixture[str]) -> None:
    walks = run_json(capsys, "walk", "--vendor", "svm", "--no-apicv")["walks"]
    assert [w["outcome"]["path"] for w in walks] == ["SLOW", "FAST"]


def test_info_names_every_generation(capsys: pytest.CaptureFixture[str]) -> None:
    facts = run_json(capsys, "info")
    assert tuple(facts["profiles"]) == fx.profiles()
    assert main(["info"]) == 0
    assert "6.18.44" in capsys.readouterr().out


def test_replay_reports(capsys: pytest.CaptureFixture[str], small_trace: Path) -> None:
    report = run_json(capsys, "replay", str(small_trace))
    assert report["mismatches"] == []
    assert report["kvm_apic_ipi"]["exact"] == report["kvm_apic_ipi"]["total"] > 0
    assert main(["replay", str(small_trace), "--quiet"]) == 0
    assert "Taken fast, by kernel generation" in capsys.readouterr().out


def test_replay_reports_the_kernels_that_are_asked_for(capsys: pytest.CaptureFixture[str], small_trace: Path) -> None:
    report = run_json(capsys, "replay", str(small_trace), "--kernels", "5.8,6.18")
    assert [g["kernel"] for vm in report["vms"] for g in vm["fast_path"]] == ["5.8", "6.18"]


def test_replay_with_a_mismatch_ends_with_1(
    capsys: pytest.CaptureFixture[str], small_trace: Path, tmp_path: Path
) -> None:
    text = small_trace.read_text()
    forged = tmp_path / "forged.txt"
    forged.write_text(text.replace("kvm_apic_ipi: dst 1 vec 64", "kvm_apic_ipi: dst 3 vec 64", 1))
    assert forged.read_text() != text
    assert main(["replay", str(forged), "--quiet"]) == 1
    assert "dst 3 vec 64" in capsys.readouterr().out


@pytest.mark.parametrize("options", [("--quiet",), ("--json",)])
def test_replay_of_a_cut_file_ends_with_a_line_that_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: tuple[str, ...]
) -> None:
    """What is left is replayed, and nobody takes that for the whole file: exit code 1 has its reason on stderr."""
    path = tmp_path / "cut.xz"
    path.write_bytes(BUNDLED.read_bytes()[:20_000])
    assert main(["replay", str(path), *options]) == 1
    said = capsys.readouterr()
    assert re.match(rf"fastexit: {re.escape(str(path))}:\d+: the compressed stream is cut short: ", said.err)
    assert said.err.count("\n") == 1
    if options == ("--json",):
        assert json.loads(said.out)["mismatches"] == []
    else:
        assert said.out.splitlines()[-1].rstrip() == "no mismatch in what could be read"


def test_replay_draws(capsys: pytest.CaptureFixture[str], small_trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    base = tmp_path / "picture"
    pictures = run_json(capsys, "replay", str(small_trace), "--picture", str(base))["pictures"]
    assert sorted(Path(p).name for p in pictures) == ["picture.png", "picture.svg"]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["walk", "--kernels", "4.4"], "unknown kernel '4.4': one of seed-v3"),
        (["walk", "--vector", "300"], "VECTOR=0x12c does not fit 8 bits"),
        (["walk", "--vector", "x"], "'x' is not a number"),
        (["walk", "--mode", "Fix"], "unknown delivery mode 'Fix'"),
        (["walk", "--msr", "0x100000000"], "MSR 0x100000000 is out of range"),
        (["walk", "--value", "-1"], "MSR value -0x1 is out of range"),
        (["walk", "--vcpus", "5000"], "'5000' is no number from 1 to 4096"),
        (["walk", "--vcpus", "0"], "'0' is no number from 1 to 4096"),
        (["walk", "--vendor", "via"], "invalid choice: 'via'"),
        (["replay", "/nowhere/at/all"], "/nowhere/at/all"),
        (["walk", "--msr", "9" * 5000], f"argument --msr: '{'9' * 40}...' does not fit 64 bits"),
        (["walk", "--value", "0x" + "f" * 5000], f"argument --value: '0x{'f' * 38}...' does not fit 64 bits"),
        (["walk", "--vcpus", "x" * 5000], f"argument --vcpus: '{'x' * 40}...' is not a number"),
        (["walk", "--kernels", "4" * 5000], f"unknown kernel '{'4' * 40}...': one of"),
        (["walk", "--mode", "m" * 5000], f"unknown delivery mode '{'m' * 40}...': one of"),
        (["replay", "t", "--picture", ""], "--picture needs the name of a file, not ''"),
        (["replay", "t", "--picture", "/"], "--picture needs the name of a file, not '/'"),
        (["demo", "--output", ""], "--output needs the name of a directory, not ''"),
        (["walk", "--kernels", "6.1,,6.12"], "'6.1,,6.12' has an empty name: kernels separated by single commas"),
        (["walk", "--kernels", "6.1,"], "'6.1,' has an empty name"),
        (["walk", "--kernels", ""], "'' has an empty name"),
        (["walk", "--kernels", "6.1,6.12, 6.1"], "'6.1,6.12, 6.1' names 6.1 twice"),
        (["walk", "--mode", ""], "unknown delivery mode ''"),
        (["replay", "t", "--mismatches", "some"], "'some' is neither a number from 0 on nor 'all'"),
        (["replay", "t", "--mismatches", "-1"], "'-1' is neither a number from 0 on nor 'all'"),
        (["replay", "t", "--kernels", "5.8,,6.18"], "has an empty name"),
        (["replay", "t", "--hv-timer", "maybe"], "invalid choice: 'maybe'"),
        (["play"], "invalid choice: 'play'"),
        (["wlak"], "did you mean walk?"),
        (["embed", "biuld"], "did you mean build?"),
        (["walk", "--shorthand", "all-but-me"], "did you mean all-but-self?"),
        ([], "required: COMMAND"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_arguments(capsys: pytest.CaptureFixture[str], args: list[str], said: str) -> None:
    assert said in refused(capsys, *args)


ICR_OPTIONS = (
    ["--dest", "1"],
    ["--dest", "0"],
    ["--vector", "0"],
    ["--mode", "Fixed"],
    ["--logical"],
    ["--shorthand", "none"],
)


@pytest.mark.parametrize("option", ICR_OPTIONS, ids=" ".join)
def test_walk_refuses_options_that_another_makes_void(capsys: pytest.CaptureFixture[str], option: list[str]) -> None:
    """Given is given, also with the value that would be the default."""
    said = refused(capsys, "walk", "--value", "0x1000000fd", *option)
    assert said == f"fastexit: --value is the whole value, so {option[0]} says nothing: leave one of them out"
    said = refused(capsys, "walk", "--msr", "0x6e0", *option)
    assert said == f"fastexit: {option[0]} describes the ICR, not MSR 0x6e0: say with --value what to write"


@pytest.mark.parametrize("shorthand", ["self", "all", "all-but-self"])
def test_a_shorthand_has_no_destination(capsys: pytest.CaptureFixture[str], shorthand: str) -> None:
    said = refused(capsys, "walk", "--shorthand", shorthand, "--dest", "0")
    assert said == f"fastexit: --shorthand {shorthand} has no destination: leave out --dest"


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ([], 0x1_0000_00FD),
        (["--dest", "0"], 0xFD),
        (["--dest", "2", "--vector", "0x31", "--mode", "lowprio", "--logical"], 0x2_0000_0931),
        (["--shorthand", "none", "--dest", "3"], 0x3_0000_00FD),
        (["--shorthand", "all-but-self", "--logical"], 0xC_08FD),
        (["--value", "0x2000"], 0x2000),
        (["--msr", "0x6e0", "--value", "0"], 0),
        (["--msr", "0x830", "--vector", "0x40"], 0x1_0000_0040),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_walk_writes(capsys: pytest.CaptureFixture[str], options: list[str], value: int) -> None:
    assert run_json(capsys, "walk", "--kernels", "6.18", *options)["value"] == value


def test_replay_refuses_a_preemption_timer_on_svm(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "replay", "t", "--hv-timer", "yes", "--vendor", "svm")
    assert said == "fastexit: --hv-timer yes and --vendor svm: SVM has no preemption timer, leave one of them out"


@pytest.mark.parametrize(("shown", "rows"), [([], 50), (["--mismatches", "3"], 3), (["--mismatches", "0"], 0)])
def test_replay_shows_as_many_mismatches_as_asked_for(
    capsys: pytest.CaptureFixture[str], small_trace: Path, shown: list[str], rows: int
) -> None:
    """Replayed with APICv, which the recording host had not, every fault and most targets are wrong."""
    args = ["replay", str(small_trace), "--kernel", "5.7", "--apicv"]
    assert main([*args, "--json", "--mismatches", "all"]) == 1
    everything = json.loads(capsys.readouterr().out)
    assert everything["mismatched"] == len(everything["mismatches"]) > 50
    assert main([*args, "--json", *shown]) == 1
    some = json.loads(capsys.readouterr().out)
    assert some["mismatched"] == everything["mismatched"]
    assert some["mismatches"] == everything["mismatches"][:rows]
    assert main([*args, "--quiet", *shown]) == 1
    out = capsys.readouterr().out
    said = f"left out: {some['mismatched'] - rows:,} (--mismatches N or all)" if rows else "none shown (--mismatches N"
    assert said in out


@pytest.mark.parametrize(("timer", "used"), [("yes", True), ("no", False), ("trace", True)])
def test_replay_takes_the_host_s_preemption_timer(
    capsys: pytest.CaptureFixture[str], small_trace: Path, timer: str, used: bool
) -> None:
    """This trace has no line that tells, so "trace" is an assumption."""
    report = run_json(capsys, "replay", str(small_trace), "--hv-timer", timer)
    came_from = "assumed" if timer == "trace" else "option"
    assert report["vms"][0]["tsc_deadline"]["preemption_timer"] == {"used": used, "from": came_from}


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("walk", "replay", "demo", "info", "trace-cmd record"))


COMMANDS = ("walk", "walk --json", "info", "replay {trace} --quiet", "--help")


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line of bash in which ``fastexit`` is this installation."""
    script = f'set -o pipefail; fastexit() {{ {shlex.quote(sys.executable)} -m fastexit "$@"; }}; {line}'
    return subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=False, env=os.environ | environment
    )


@pytest.fixture(scope="module")
def kept_kernels() -> None:
    """Where a command says nothing on stderr, it must not have to say that it compiles."""
    fx.warmup()


@pytest.mark.usefixtures("kept_kernels")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_closed_pipe_is_no_error(command: str, small_trace: Path) -> None:
    """The reader goes away before anything is written: nothing is said, and pipefail finds nothing."""
    done = shell(f"fastexit {command.format(trace=small_trace)} | exec true")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_module_runs_into_head() -> None:
    """``fastexit info | head -n 1``: the reader has seen enough."""
    done = shell("fastexit info | head -n 1")
    assert "fastexit" in done.stdout
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", ["walk", "walk --json", "info", "--help"])
def test_a_closed_stdout_is_said_in_one_line(command: str) -> None:
    """``fastexit walk --json >&-``: there is nowhere to write to."""
    done = shell(f"fastexit {command} >&-")
    assert (done.returncode, done.stderr) == (2, "fastexit: standard output is closed\n")


def test_everything_closed_is_only_an_exit_code() -> None:
    """Without stdout and stderr nothing can be said, and nothing breaks."""
    assert shell("fastexit info >&- 2>&-").returncode == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["info", "info --json"])
def test_a_full_disk_is_said_in_one_line(command: str) -> None:
    """``fastexit info > /dev/full``: no traceback, and not a second message at exit."""
    done = shell(f"fastexit {command} > /dev/full")
    assert done.returncode == 2
    assert done.stderr == "fastexit: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("columns", ["0", "-5", "wide", ""])
def test_columns_that_no_terminal_has_count_as_unset(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main(["walk"]) == 0
    expected = capsys.readouterr().out
    assert "vcpu_enter_guest" in expected
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["walk"]) == 0
    assert capsys.readouterr().out == expected


def test_info_says_when_the_cache_directory_is_not_writable(tmp_path: Path) -> None:
    """A file where the cache directory should be: kernels are compiled each time, so it has to be said."""
    (tmp_path / "file").touch()
    nowhere = Path("/proc/none")  # which root could not make either
    for place, suffix in ((tmp_path / "file", " (not writable)"), (nowhere, " (not writable)"), (tmp_path / "new", "")):
        done = shell("fastexit info --json", FASTEXIT_CACHE_DIR=str(place), NUMBA_DISABLE_JIT="0")
        said = json.loads(done.stdout)["kernel cache"]
        assert said.startswith(str(place))
        assert said.endswith(" (not writable)") == bool(suffix)
    assert not (tmp_path / "new").exists()


def test_replay_takes_the_recording_kernels_options(capsys: pytest.CaptureFixture[str], small_trace: Path) -> None:
    """A 6.18 without APICv recorded this trace: for anything else there are mismatches, and nothing on stderr."""
    assert main(["replay", str(small_trace), "--quiet", "--kernel", "5.7", "--apicv"]) == 1
    said = capsys.readouterr()
    assert "replayed as 5.7 vmx with APICv" in said.out
    assert "mismatches" in said.out
    assert said.err == ""
    with pytest.raises(SystemExit, match="2"):
        main(["replay", str(small_trace), "--kernel", "4.4"])


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is refused has to be refused before this."""

    def work() -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr("fastexit.cli.commands._compile", work)


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "fastexit.trace.heatmap", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons in no time: the demo's are timed by the benchmarks."""
    module = "fastexit.insight.compare"
    monkeypatch.setattr(f"{module}.compare", lambda kernel, door: Comparison(kernel, door, 1.0, 2.0, 2.0))
    monkeypatch.setattr(f"{module}.compare_until_ipi", lambda kernel: Comparison(kernel, "IPI", 1.0, 2.0, 2.0))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("where", ["file", "file/below", "nowhere/at/all"])
def test_replay_refuses_a_picture_it_cannot_write_before_the_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, where: str
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    said = refused(capsys, "replay", "t", "--picture", str(tmp_path / where / "picture"))
    assert said.startswith(f"fastexit: --picture: cannot write to '{tmp_path / where}'")


@pytest.mark.usefixtures("no_work", "no_matplotlib")
def test_replay_refuses_a_picture_without_matplotlib_before_the_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = refused(capsys, "replay", "t", "--picture", str(tmp_path / "picture"))
    assert said == "fastexit: --picture: pictures need matplotlib: pip install matplotlib"


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("where", ["file", "file/below"])
def test_demo_refuses_an_unusable_output_before_the_work(
    capsys: pytest.CaptureFixture[str], small_trace: Path, tmp_path: Path, where: str
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    said = refused(capsys, "demo", "--trace", str(small_trace), "--output", str(tmp_path / where))
    assert said.startswith(f"fastexit: --output: cannot create '{tmp_path / where}'")


@pytest.mark.usefixtures("quick", "no_matplotlib")
def test_demo_without_matplotlib_does_everything_else(
    capsys: pytest.CaptureFixture[str], small_trace: Path, tmp_path: Path
) -> None:
    assert main(["demo", "--trace", str(small_trace), "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert all(f"{number}. " in out for number in range(1, 6))
    assert "no mismatch" in out
    assert "pictures need matplotlib: pip install matplotlib" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("quick")
def test_demo_shows_and_draws(capsys: pytest.CaptureFixture[str], small_trace: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main(["demo", "--trace", str(small_trace), "--output", str(tmp_path / "new" / "out")]) == 0
    out = capsys.readouterr().out
    assert "At the Python door a fast exit that re-enters the guest is one compiled call" in out
    assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == {"ipi-heatmap.png", "ipi-heatmap.svg"}


@pytest.mark.usefixtures("quick")
def test_demo_of_a_trace_without_ipis_has_no_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The first lines of a boot: no second vCPU yet."""
    pytest.importorskip("matplotlib")
    silent = tmp_path / "silent.txt"
    with lzma.open(BUNDLED, "rt") as source:
        silent.write_text("".join(line for line, _ in zip(source, range(300), strict=False)))
    assert main(["demo", "--trace", str(silent), "--output", str(tmp_path / "out")]) == 0
    assert "there is nothing to draw" in capsys.readouterr().out


def test_demo_json_is_json(capsys: pytest.CaptureFixture[str], small_trace: Path, tmp_path: Path) -> None:
    """The whole demo, comparisons included, and nothing but JSON on stdout."""
    pytest.importorskip("matplotlib")
    found = run_json(capsys, "demo", "--trace", str(small_trace), "--output", str(tmp_path))
    assert found["replay"]["mismatches"] == []
    assert [w["kernel"] for w in found["walks"]] == ["seed-v3", fx.profiles()[-1]]
    assert all(row["fast_ns"] > 0 and row["generic_ns"] > 0 for row in found["comparison"])
    assert sorted(Path(path).suffix for path in found["pictures"]) == [".png", ".svg"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_in_order(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command holds, an emulated machine say, is let go when the process is asked to end."""
    outside = signal.signal(number, signal.default_int_handler)  # whoever runs the tests may ignore it
    let_go = []

    def held(_args: argparse.Namespace) -> int:
        try:
            os.kill(os.getpid(), number)
            time.sleep(30)
        finally:
            os.kill(os.getpid(), number)  # a shell tells of a closed terminal twice
            let_go.append(True)
        return 0

    monkeypatch.setattr(commands, "info", held)
    try:
        with pytest.raises(SystemExit) as ended:
            main(["info"])
        found = ended.value.code, let_go, signal.getsignal(number)
    finally:
        signal.signal(number, outside)
    assert found == (128 + number, [True], signal.default_int_handler)


def test_a_signal_that_is_ignored_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(_args: argparse.Namespace) -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        return 0

    monkeypatch.setattr(commands, "info", ended)
    outside = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert (main(["info"]), signal.getsignal(signal.SIGHUP)) == (0, signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGHUP, outside)
