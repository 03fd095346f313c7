"""Times of cases that take turns in one process, peaks in processes of their own, and the record of both."""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("torch", "transformers", "trl", "liger-kernel", "nvidia-modelopt")
Step = Callable[[], object]


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a forked process, which has all imports and none of the memory of what ran before.

    The calling process must not have computed anything: OpenMP's threads and CUDA do not survive a fork.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function(*arguments)))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__}{arguments} died; its traceback is above.") from None
    finally:
        process.join()
    return result


def timed(step: Step) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(steps: Mapping[str, Step], repeats: int) -> dict[str, list[float]]:
    """Seconds of every step in every turn, after one turn that is not counted."""
    turns = [{name: timed(step) for name, step in steps.items()} for _ in range(repeats + 1)]
    return {name: [turn[name] for turn in turns[1:]] for name in steps}


def peak_megabytes(step: Step) -> float:
    """How far one call raises the memory in use: of the device, or resident in a process that does nothing else."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(field: str) -> float:
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def medians(row: Mapping[str, Any]) -> dict[str, float]:
    """The median turn of every case of a row."""
    return {name: statistics.median(turns) for name, turns in row["seconds"].items()}


def print_rows(title: str, row: Mapping[str, Any]) -> None:
    """Print the measurements of one setting, the first case being the reference.

    The time is the median of the turns.
    """
    print(f"\n{title}\n{'':38}" + "".join(f"{name:>14}" for name in next(iter(table(row).values()))))
    for name, cells in table(row).items():
        print(f"{name:38}" + "".join(f"{cell:14.4g}" for cell in cells.values()))


def table(row: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The cells of every case of a row by their column: the first case is the reference of the ratios."""
    if "cases" in row:
        return row["cases"]
    seconds, peaks, tokens = medians(row), row.get("peak_mb", {}), row.get("tokens")
    floor = seconds.pop("floor", None)
    first = next(iter(seconds))
    cells = {}
    for name, now in seconds.items():
        cells[name] = {"seconds": now, "ratio": now / seconds[first]}
        cells[name] |= {"peak (MB)": peaks[name], "ratio of peaks": peaks[name] / peaks[first]} if peaks else {}
        cells[name] |= {"floor": floor / now} if floor else {}
        cells[name] |= {"tokens/s": tokens / now} if tokens else {}
    return cells


def load(suite: str) -> list[dict[str, Any]]:
    """All rows of `results/<suite>.json`."""
    path = RESULTS / f"{suite}.json"
    return json.loads(path.read_text()) if path.exists() else []


def record(suite: str, row: dict[str, Any]) -> None:
    """Add a row to `results/<suite>.json`, with the machine, the versions and the command."""
    path = RESULTS / f"{suite}.json"
    facts = {"machine": machine(), "versions": _versions(), "command": _command()}
    known = load(suite)
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(json.dumps([*known, {**row, **facts}], indent=1) + "\n")
    unfinished.replace(path)


def machine() -> dict[str, Any]:
    """Processor and GPU; asked in a process of its own, because it may start CUDA."""
    return in_child(_machine)


def _command() -> str:
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": model[1] if model else None, "cores": os.cpu_count(), "gpu": device}


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
