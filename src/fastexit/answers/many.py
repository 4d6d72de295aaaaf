"""Many traces in one report: each is read by a process of its own, here or on a Dask cluster, and named if that fails.

The order of the files is kept. Whatever becomes of one of them, a damaged file, a fault, a process that is killed, the
others go on, and the report says which one it was.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

from fastexit.answers.report import FileReport, Report

One = Callable[[str], Report]
"""Reads one trace. It is sent to other processes: a function of a module, or a functools.partial of one."""

_TICK = 0.5
_SLOW = 10.0
_MUCH_SLOWER = 5.0
_PATIENCE = 10.0


@dataclass
class Progress:
    """How far a run is: files done of all, and the ones that are being read with their seconds, the longest first."""

    done: int
    total: int
    running: list[tuple[str, float]] = field(default_factory=list)


Tell = Callable[[Progress], object]


def files(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """The files that are meant: those of a folder, and of folders in it, in the order of their names.

    ValueError for a folder without files; names that begin with a dot are left out.
    """
    found: list[str] = []
    for path in [os.fspath(one) for one in paths]:
        if path == "-" or not os.path.isdir(path):
            found.append(path)
            continue
        below = sorted(str(one) for one in Path(path).rglob("*") if one.is_file() and _is_shown(one, Path(path)))
        if not below:
            raise ValueError(f"{path}: there is no file in this folder")
        found += below
    return found


def _is_shown(file: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in file.relative_to(folder).parts)


def run(
    paths: Sequence[str | os.PathLike[str]],
    one: One,
    jobs: int | None = None,
    dask: Any = None,
    progress: Tell | None = None,
) -> Report:
    """Reads every file of ``paths`` (see files) with ``one`` and merges what comes.

    Args:
        paths: files and folders; "-" is standard input, which is read in this process.
        one: gives the report of one file.
        jobs: processes; None is one a CPU that this process may use, 1 none beside this one.
        dask: the address of a Dask scheduler, or a distributed.Client: then its workers read the files, which they
            must see under the same names.
        progress: called about twice a second and at the end.

    ValueError, one line, where there is nothing to read or no scheduler; ModuleNotFoundError where distributed is
    missing. What is wrong with a file is in its FileReport.
    """
    began = time.monotonic()
    names = files(paths)
    told = progress or (lambda _: None)
    done: dict[int, tuple[Report, float]] = {}
    elsewhere = [i for i, name in enumerate(names) if name != "-"]
    wanted = min(jobs or len(os.sched_getaffinity(0)), len(elsewhere))
    if dask is not None:
        _on_dask(names, elsewhere, one, dask, done, told)
    elif wanted > 1:
        _in_processes(names, elsewhere, one, wanted, done, told)
    for i, name in enumerate(names):
        if i not in done:
            told(Progress(len(done), len(names), [(name, 0.0)]))
            done[i] = _timed(one, name)
    told(Progress(len(done), len(names)))
    _name_slow(list(done.values()))
    merged = merge([done[i][0] for i in range(len(names))])
    merged.seconds = time.monotonic() - began
    return merged


def merge(reports: Sequence[Report]) -> Report:
    """One report of several, in their order."""
    whole = Report()
    for report in reports:
        whole.files += report.files
        whole.vms += report.vms
        whole.costs = whole.costs or report.costs
        whole.seconds += report.seconds
    return whole


def _refused(path: str, why: str, problems: Sequence[str] = ()) -> Report:
    return Report([FileReport(path, refused=why, problems=list(problems))])


def _timed(one: One, path: str) -> tuple[Report, float]:
    """What ``one`` says of a file, and its seconds; whatever it raises is said of the file."""
    began = time.monotonic()
    try:
        report = one(path)
    except (OSError, ValueError) as error:
        report = _refused(path, _line(error.strerror if isinstance(error, OSError) and error.strerror else error))
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__} in {Path(frame.filename).name}, line {frame.lineno}: {_line(error)}"
        report = _refused(path, f"failed with {where}", ["this is a fault of fastexit, not of the trace"])
    return report, time.monotonic() - began


def _line(error: object) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _pickled(one: One) -> bytes:
    try:
        return pickle.dumps(one)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(f"what reads a trace is sent to other processes, but {_line(error)}") from None


def _read(pickled: bytes, path: str) -> tuple[Report, float]:
    """In a worker."""
    one: One = pickle.loads(pickled)
    return _timed(one, path)


def _name_slow(done: list[tuple[Report, float]]) -> None:
    """A file that took much longer than the others has a note."""
    if len(done) < 3:
        return
    usual = median(seconds for _, seconds in done)
    for report, seconds in done:
        if seconds > _SLOW and seconds > _MUCH_SLOWER * usual and report.files:
            report.files[0].notes.append(f"took {seconds:,.0f} s, half of the files less than {usual:,.1f} s")


@contextmanager
def _no_main(pickled: bytes) -> Iterator[None]:
    """Processes that begin here do not import the program's main file, unless what they do is in it.

    Else a script that calls this without a guard of ``__name__`` would begin again in each of them.
    """
    if b"__main__" in pickled:
        yield
        return
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _in_processes(
    names: list[str], todo: list[int], one: One, jobs: int, done: dict[int, tuple[Report, float]], told: Tell
) -> None:
    """Fills ``done``; when a process dies, those files that it may have been reading are read again, each alone."""
    pickled = _pickled(one)
    context = multiprocessing.get_context("spawn")
    waiting = list(reversed(todo))
    while waiting:
        running: dict[Future[tuple[Report, float]], tuple[int, float]] = {}
        suspects: list[int] = []
        with ProcessPoolExecutor(jobs, context, _leave_interrupts) as pool:
            try:
                while waiting or running:
                    while waiting and len(running) < jobs + 1 and not suspects:
                        with _no_main(pickled):
                            future = pool.submit(_read, pickled, names[waiting[-1]])
                        running[future] = waiting.pop(), time.monotonic()
                    if not running:
                        break
                    for future in wait(running, _TICK, FIRST_COMPLETED).done:
                        i, _ = running.pop(future)
                        try:
                            done[i] = future.result()
                        except BrokenProcessPool:
                            suspects.append(i)
                        except Exception as error:  # its result could not be sent
                            done[i] = _refused(names[i], f"failed: {_line(error)}"), 0.0
                    told(_so_far(names, done, running))
            except BrokenProcessPool:  # by submit
                suspects += [i for i, _ in running.values()]
            except BaseException:
                begun = list((pool._processes or {}).values())
                pool.shutdown(wait=False, cancel_futures=True)
                for process in begun:
                    process.kill()
                raise
        known = {*done, *suspects}
        waiting = [i for i in reversed(todo) if i not in known]
        for i in sorted(set(suspects) - set(done)):
            told(Progress(len(done), len(names), [(names[i], 0.0)]))
            done[i] = _alone(context, pickled, names[i])


def _leave_interrupts() -> None:
    """Ctrl-C ends the run, and the run its processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _so_far(names: list[str], done: dict[int, tuple[Report, float]], running: dict[Any, tuple[int, float]]) -> Progress:
    now = time.monotonic()
    longest = sorted(((names[i], now - since) for i, since in running.values()), key=lambda pair: -pair[1])
    return Progress(len(done), len(names), longest)


def _alone(context: Any, pickled: bytes, path: str) -> tuple[Report, float]:
    """Reads one file in a process of its own, whose death is that file's."""
    here, there = context.Pipe(duplex=False)
    with _no_main(pickled):
        process = context.Process(target=_send, args=(there, pickled, path))
        process.start()
    there.close()
    try:
        result: tuple[Report, float] = here.recv()
    except EOFError:
        process.join()
        return _refused(path, f"the process that read it {_ended(process.exitcode)}"), 0.0
    finally:
        here.close()
    process.join()
    return result


def _send(connection: Connection, pickled: bytes, path: str) -> None:
    connection.send(_read(pickled, path))
    connection.close()


def _ended(code: int | None) -> str:
    if code is not None and code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"was ended by {name}{', as the kernel does when memory runs out' if name == 'SIGKILL' else ''}"
    return f"ended with exit code {code}"


def _on_dask(
    names: list[str], todo: list[int], one: One, dask: Any, done: dict[int, tuple[Report, float]], told: Tell
) -> None:
    """Fills ``done`` from a cluster, which moves the files of a worker that dies to others."""
    try:
        from distributed import Client
        from distributed import wait as wait_for
    except ModuleNotFoundError:
        missing = "a Dask cluster needs distributed: pip install distributed"
        raise ModuleNotFoundError(missing, name="distributed") from None
    pickled = _pickled(one)
    client = dask
    if isinstance(dask, str):
        try:
            client = Client(dask, timeout=_PATIENCE)
        except (OSError, ValueError) as error:
            raise ValueError(f"no Dask scheduler answers at {dask}: {_line(error)}") from None
    try:
        began = time.monotonic()
        running = {}
        for i in todo:
            running[client.submit(_read, pickled, names[i], pure=False)] = i, began
        while running:
            try:
                finished = wait_for(list(running), timeout=_TICK, return_when="FIRST_COMPLETED").done
            except TimeoutError:
                finished = set()
            for future in finished:
                i, _ = running.pop(future)
                try:
                    done[i] = future.result()
                except Exception as error:
                    done[i] = _refused(names[i], f"no worker could read it: {_line(error)}"), 0.0
                future.release()
            told(_so_far(names, done, running))
    finally:
        if client is not dask:
            client.close()
