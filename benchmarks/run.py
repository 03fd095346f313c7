"""Measure the loss, how its cost grows, or a whole training step, against the alternatives that are installed; and
what objectives cost, and what they add.

    python benchmarks/run.py loss [--preset bf16 frozen masked fp32] [--cases ...] [--threads 1] [--write]
    python benchmarks/run.py growth [--tokens 256 1024 4096] [--vocabularies 32000 128256] [--write]
    python benchmarks/run.py step [--write]
    python benchmarks/run.py taps [--cases ...] [--write]
    python benchmarks/run.py objectives [--cases ...] [--seeds 3] [--steps 20] [--write]

Cases take turns in one process, and the median turn of each counts; peaks come from a process each. `--write` adds
the rows to benchmarks/results, from which `report.py` makes the tables. Liger is measured where it is installed:
`pip install --no-deps liger-kernel==0.8.5`.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from typing import Any

import loss
import measure
import objectives
import report
import step
import taps


PRESETS = {
    "bf16": loss.Setting(),
    "frozen": loss.Setting(frozen=True),
    "masked": loss.Setting(masked=0.5),
    "fp32": loss.Setting(dtype="float32"),
}
SUITES = {"loss": loss, "growth": loss, "step": step, "taps": taps, "objectives": objectives}
CASES = {
    "loss": loss.available(),
    "growth": ["naive full logits", "hf_distill"],
    "step": list(step.CASES),
    "taps": list(objectives.CASES),
    "objectives": list(objectives.CASES),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=list(PRESETS), help="settings of `loss`")
    parser.add_argument("--cases", nargs="+", help="what to measure; the first is the reference of the ratios")
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048])
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[49152])
    parser.add_argument("--threads", nargs="+", type=int, help="1 and 2; for `taps` and `objectives` 2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each case of `objectives`")
    parser.add_argument("--steps", type=int, default=objectives.Setting.steps, help="of a run of `objectives`")
    parser.add_argument("--write", action="store_true", help="add the rows to benchmarks/results/<suite>.json")
    args = parser.parse_args()
    if unknown := set(args.cases or ()) - set(SUITES[args.suite].CASES):
        parser.error(f"unknown --cases {sorted(unknown)}; choose from {list(SUITES[args.suite].CASES)}")
    cases = args.cases or CASES[args.suite]
    for threads in args.threads or ([2] if args.suite in ("taps", "objectives") else [1, 2]):
        if args.suite == "objectives":
            setting = objectives.Setting(steps=args.steps)
            print(report.comparison(objectives.run(setting, cases, args.seeds, threads, args.write)))
            continue
        for preset, setting in _settings(args):
            row = {"preset": preset, **SUITES[args.suite].measure(setting, cases, args.repeats, threads)}
            measure.print_rows(f"{args.suite} {preset} {asdict(setting)} threads={threads}", row)
            if args.write:
                measure.record(args.suite, row)


def _settings(args: argparse.Namespace) -> list[tuple[str, Any]]:
    if args.suite in ("step", "taps"):
        return [("bf16", step.Setting())]
    presets = args.preset if args.suite == "loss" else ["bf16"]
    sizes = [(tokens, vocabulary) for vocabulary in args.vocabularies for tokens in args.tokens]
    return [(name, replace(PRESETS[name], tokens=n, vocabulary=v)) for name in presets for n, v in sizes]


if __name__ == "__main__":
    main()
