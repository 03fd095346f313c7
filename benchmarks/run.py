"""Measure the loss, how its cost grows, or a whole training step, against the alternatives that are installed; what
objectives cost, and what they add; what soft labels on disk keep, and what they cost.

    python benchmarks/run.py loss [--preset bf16 frozen masked fp32] [--cases ...] [--threads 1] [--write]
    python benchmarks/run.py growth [--tokens 256 1024 4096] [--vocabularies 32000 128256] [--write]
    python benchmarks/run.py step [--write]
    python benchmarks/run.py taps [--cases ...] [--write]
    python benchmarks/run.py objectives [--cases ...] [--seeds 3] [--steps 20] [--rows 4] [--learning-rate 1e-3]
    python benchmarks/run.py labels | sizes [--cases ...] [--write]
    python benchmarks/run.py build | read | cached [--cases ...] [--write]

Cases take turns in one process, and the median turn of each counts; peaks come from a process each. `--write` adds
the rows to benchmarks/results, from which `report.py` makes the tables. Liger is measured where it is installed:
`pip install --no-deps liger-kernel==0.8.5`. So is DistillKit, with its repository's root on `PYTHONPATH`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import cached
import labels
import loss
import measure
import objectives
import report
import sizes
import step
import taps


PRESETS = {
    "bf16": loss.Setting(),
    "frozen": loss.Setting(frozen=True),
    "masked": loss.Setting(masked=0.5),
    "fp32": loss.Setting(dtype="float32"),
}


class Suite(NamedTuple):
    """What measures cases under a setting, how many turns and threads given; cases that can run here, and all."""

    measure: Callable[..., dict[str, Any]]
    cases: Collection[str]
    known: Collection[str]
    threads: tuple[int, ...] = (2,)


ONE_SETTING: dict[str, Any] = {"step": step.Setting(), "taps": step.Setting(), "labels": labels.Setting()}
ONE_SETTING["sizes"] = sizes.Setting()
ONE_SETTING |= dict.fromkeys(("build", "read", "cached"), cached.Setting())
LEARNING = {**objectives.CASES, **objectives.FROM_DISK}
SUITES = {
    "loss": Suite(loss.measure, loss.available(), loss.CASES, (1, 2)),
    "growth": Suite(loss.measure, ["naive full logits", "hf_distill"], loss.CASES, (1, 2)),
    "step": Suite(step.measure, step.CASES, step.CASES, (1, 2)),
    "taps": Suite(taps.measure, objectives.CASES, objectives.CASES),
    "objectives": Suite(objectives.run, LEARNING, LEARNING),
    "labels": Suite(labels.measure, labels.available(), labels.CASES),
    "sizes": Suite(sizes.measure, sizes.CASES, sizes.CASES),
    "build": Suite(cached.measure_builds, cached.BUILDS, cached.BUILDS),
    "read": Suite(cached.measure_reads, cached.READS, cached.READS, (1,)),
    "cached": Suite(cached.measure_steps, cached.STEPS, cached.STEPS),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=list(PRESETS), help="settings of `loss`")
    parser.add_argument("--cases", nargs="+", help="what to measure; the first is the reference of the ratios")
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048])
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[49152])
    parser.add_argument("--threads", nargs="+", type=int, help="default: 1 and 2, or what the suite is about")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each case of `objectives`")
    parser.add_argument("--steps", type=int, default=objectives.Setting.steps, help="of a run of `objectives`")
    parser.add_argument("--rows", type=int, default=objectives.Setting.rows, help="of a step of `objectives`")
    parser.add_argument("--learning-rate", type=float, default=objectives.Setting.learning_rate)
    parser.add_argument("--write", action="store_true", help="add the rows to benchmarks/results/<suite>.json")
    args = parser.parse_args()
    suite = SUITES[args.suite]
    if unknown := set(args.cases or ()) - set(suite.known):
        parser.error(f"unknown --cases {sorted(unknown)}; choose from {list(suite.known)}")
    cases = args.cases or list(suite.cases)
    for threads in args.threads or suite.threads:
        if args.suite == "objectives":
            setting = objectives.Setting(steps=args.steps, rows=args.rows, learning_rate=args.learning_rate)
            print(report.comparison(objectives.run(setting, cases, args.seeds, threads, args.write)))
            continue
        for preset, setting in _settings(args):
            row = {"preset": preset, **suite.measure(setting, cases, args.repeats, threads)}
            measure.print_rows(f"{args.suite} {preset} {asdict(setting)} threads={threads}", row)
            if args.write:
                measure.record(args.suite, row)


def _settings(args: argparse.Namespace) -> list[tuple[str, Any]]:
    if args.suite in ONE_SETTING:
        return [("bf16", ONE_SETTING[args.suite])]
    presets = args.preset if args.suite == "loss" else ["bf16"]
    sizes = [(tokens, vocabulary) for vocabulary in args.vocabularies for tokens in args.tokens]
    return [(name, replace(PRESETS[name], tokens=n, vocabulary=v)) for name in presets for n, v in sizes]


if __name__ == "__main__":
    main()
