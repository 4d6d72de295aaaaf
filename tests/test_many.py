"""Many files: order kept, nothing lost, whoever fails is named, here and on a cluster whose workers die."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fastexit.answers import many
from fastexit.answers.many import Progress, run
from fastexit.answers.report import FileReport, Report, VmReport


def obey(path: str, log: str = "") -> Report:
    """Does what the file says; ``log`` gets a line for each reading."""
    if path == "-":
        return Report([FileReport("-", shape=sys.stdin.read())])
    if log:
        with open(log, "a") as file:
            file.write(f"{Path(path).name}\n")
    order, *words = Path(path).read_text().split()
    if order == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if order == "leave":
        os._exit(7)
    if order == "sleep":
        time.sleep(float(words[0]))
    if order == "refuse":
        raise ValueError("line 1 is no trace\nand more")
    if order == "fail":
        raise KeyError("missing")
    if order == "unsendable":
        return Report([FileReport(path, tables=[{"a": lambda: 0}])])
    return Report([FileReport(path, shape=order)], [VmReport(path, 1)], costs="epyc")


def folder(tmp_path: Path, *orders: str) -> list[str]:
    (tmp_path / "in").mkdir(exist_ok=True)
    paths = []
    for i, order in enumerate(orders):
        path = tmp_path / "in" / f"{i:02}.trace"
        path.write_text(order)
        paths.append(str(path))
    return paths


def said(report: Report) -> list[str]:
    return [file.refused or file.shape for file in report.files]


def test_order_is_kept(tmp_path: Path) -> None:
    paths = folder(tmp_path, "sleep 0.6", *(f"order{i}" for i in range(8)))
    seen: list[Progress] = []
    report = run(paths, obey, jobs=2, progress=seen.append)
    assert said(report) == ["sleep", *(f"order{i}" for i in range(8))]
    assert [vm.path for vm in report.vms] == [file.path for file in report.files] == paths
    assert report.costs == "epyc"
    assert report.seconds >= 0.6
    assert (seen[-1].done, seen[-1].total, seen[-1].running) == (9, 9, [])
    assert paths[0] in {path for one in seen for path, _ in one.running}


@pytest.mark.parametrize("jobs", [1, 2])
def test_who_fails_is_named(tmp_path: Path, jobs: int) -> None:
    paths = folder(tmp_path, "a", "refuse", "fail", "b")
    report = run([*paths, str(tmp_path / "absent")], obey, jobs=jobs)
    told = said(report)
    assert told[:2] == ["a", "line 1 is no trace"]
    assert told[2].startswith("failed with KeyError in test_many.py, line ")
    assert told[2].endswith(": 'missing'")
    assert told[3:] == ["b", "No such file or directory"]
    assert report.files[2].problems == ["this is a fault of fastexit, not of the trace"]


def test_a_dead_process_names_its_file_and_the_others_go_on(tmp_path: Path) -> None:
    orders = [f"order{i}" for i in range(10)]
    orders[2], orders[3], orders[7] = "die", "sleep 1", "leave"
    log = tmp_path / "log"
    report = run(folder(tmp_path, *orders), partial(obey, log=str(log)), jobs=2)
    expected = list(orders)
    expected[2] = "the process that read it was ended by SIGKILL, as the kernel does when memory runs out"
    expected[3] = "sleep"
    expected[7] = "the process that read it ended with exit code 7"
    assert said(report) == expected
    assert [vm.path for vm in report.vms] == [file.path for file in report.files if not file.refused]
    read = log.read_text().split()
    assert max(read.count(name) for name in set(read)) <= 3


def test_what_cannot_be_sent_back_is_named(tmp_path: Path) -> None:
    told = said(run(folder(tmp_path, "a", "unsendable", "b"), obey, jobs=2))
    assert told[::2] == ["a", "b"]
    assert told[1].startswith("failed: ")


def test_what_cannot_be_sent_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^what reads a trace is sent to other processes, but .*lambda"):
        run(folder(tmp_path, "a", "b"), lambda path: Report(), jobs=2)
    assert said(run(folder(tmp_path, "a"), lambda path: obey(path), jobs=1)) == ["a"]


def test_standard_input_is_read_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("typed"))
    assert said(run([*folder(tmp_path, "a", "b"), "-"], obey, jobs=2)) == ["a", "b", "typed"]


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "z" / "deep").mkdir(parents=True)
    for name in ("z/b.trace", "z/a.trace", "z/.hidden", "z/deep/c.trace", "z/.git/x", "one"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = many.files([tmp_path / "z", tmp_path / "one", "-", "absent"])
    assert [os.path.relpath(path, tmp_path) if path.startswith("/") else path for path in found] == [
        *("z/a.trace", "z/b.trace", "z/deep/c.trace", "one", "-", "absent")
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: there is no file in this folder$"):
        many.files([tmp_path / "empty"])
    assert run([], obey).files == []


def test_slow_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = {"a": 0.1, "b": 0.1, "slow": 60.0, "c": 0.2}

    def timed(one: Callable[[str], Report], path: str) -> tuple[Report, float]:
        report = one(path)
        return report, spent[report.files[0].shape]

    monkeypatch.setattr(many, "_timed", timed)
    report = run(folder(tmp_path, *spent), obey, jobs=1)
    assert [len(file.notes) for file in report.files] == [0, 0, 1, 0]
    assert report.files[2].notes[0].startswith("took ")


def test_a_script_without_a_guard(tmp_path: Path) -> None:
    """What a researcher writes first: no function, no ``if __name__``."""
    folder(tmp_path, "a", "b", "c")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nprint('begins')\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from fastexit.answers.many import run\nfrom test_many import obey\n"
        f"print([f.shape for f in run([{str(tmp_path / 'in')!r}], obey, jobs=2).files])\n"
    )
    out = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=120)
    assert (out.stdout, out.stderr) == ("begins\n['a', 'b', 'c']\n", "")


def test_interrupt_ends_all(tmp_path: Path) -> None:
    folder(tmp_path, "sleep 60", "sleep 60", "sleep 60")
    script = (
        f"import signal, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background has it ignored
        "from fastexit.answers.many import run\nfrom test_many import obey\n"
        f"run([{str(tmp_path / 'in')!r}], obey, jobs=2, progress=lambda p: print(len(p.running), flush=True))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    process.stdout.readline()
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert time.monotonic() - began < 20
    assert errors.count("KeyboardInterrupt") == 1


def test_missing_distributed_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ModuleNotFoundError, match=r"^a Dask cluster needs distributed: pip install distributed$"):
        run(folder(tmp_path, "a"), obey, dask="tcp://127.0.0.1:1")


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
@pytest.mark.long
class TestCluster:
    """Two workers on this machine."""

    @pytest.fixture(scope="class")
    def cluster(self) -> Any:
        distributed = pytest.importorskip("distributed", reason="distributed is not installed: no tests on a cluster")
        with (
            distributed.LocalCluster(
                n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
            ) as running,
            distributed.Client(running) as client,
        ):
            here = str(Path(__file__).parent)
            client.run(lambda: sys.path.insert(0, here))
            yield client

    def test_order_and_failures(self, cluster: Any, tmp_path: Path) -> None:
        paths = folder(tmp_path, "sleep 0.5", "a", "refuse", "b", "fail")
        report = run(paths, obey, dask=cluster.scheduler.address)
        assert said(report)[:4] == ["sleep", "a", "line 1 is no trace", "b"]
        assert said(report)[4].startswith("failed with KeyError")
        assert [file.path for file in report.files] == paths

    def test_no_scheduler_is_one_line(self, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(many, "_PATIENCE", 0.5)
        with pytest.raises(ValueError, match=r"^no Dask scheduler answers at tcp://127\.0\.0\.1:1: "):
            run(folder(tmp_path, "a"), obey, dask="tcp://127.0.0.1:1")

    def test_a_worker_is_killed(self, cluster: Any, tmp_path: Path) -> None:
        log = tmp_path / "log"
        victims = list(cluster.run(os.getpid).values())[:1]

        def kill(progress: Progress) -> None:
            if progress.done and victims:
                os.kill(victims.pop(), signal.SIGKILL)

        orders = ["sleep 0.7"] * 8
        paths = folder(tmp_path, *orders)
        report = run(paths, partial(obey, log=str(log)), dask=cluster, progress=kill)
        assert victims == []
        assert said(report) == ["sleep"] * 8
        assert [file.path for file in report.files] == paths
        assert len(log.read_text().split()) > 8

    def test_a_file_that_kills_workers_is_named(self, cluster: Any, tmp_path: Path) -> None:
        report = run(folder(tmp_path, "a", "die", "b"), obey, dask=cluster)
        assert said(report)[::2] == ["a", "b"]
        assert said(report)[1].startswith("no worker could read it: ")
