"""Time and peak memory of CE + T^2 KL from hidden states, forward and backward, heads included.

    python benchmarks/loss.py [--dtype float32] [--frozen] [--masked 0.5] [--write]

Times are medians of turns in one process; each peak (over the inputs) is taken in a process of its own.
`floor` is the share of the time that the matrix products take which no loss can avoid.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_distill.functional import METRICS, LMHead, linear_distillation_loss


RESULTS = Path(__file__).parent / "results" / "loss.json"
TEMPERATURE = 2.0
Inputs = tuple[Tensor, LMHead, Tensor, Tensor, LMHead]


def inputs(args: argparse.Namespace, tokens: int) -> Inputs:
    torch.manual_seed(0)

    def draw(rows: int, width: int, size: float = 1.0) -> Tensor:
        return torch.empty(rows, width, dtype=getattr(torch, args.dtype)).normal_(std=size)

    widths = args.student_width, args.teacher_width
    hidden, teacher_hidden = (draw(tokens, width) for width in widths)
    head, teacher_head = (LMHead(draw(args.vocabulary, width, 2 * width**-0.5)) for width in widths)
    head.weight.requires_grad_(not args.frozen)
    labels = torch.randint(0, args.vocabulary, (tokens,))
    labels[: int(args.masked * tokens)] = -100
    return hidden.requires_grad_(), head, labels, teacher_hidden, teacher_head


def naive(hidden: Tensor, head: LMHead, labels: Tensor, teacher_hidden: Tensor, teacher_head: LMHead) -> Tensor:
    student, teacher = head(hidden).float(), teacher_head(teacher_hidden).float()
    log_q, log_p = (F.log_softmax(z / TEMPERATURE, -1) for z in (student, teacher))
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    return 0.5 * F.cross_entropy(student, labels) + 0.5 * TEMPERATURE**2 * kl[labels != -100].mean()


def ours(student: Callable = lambda head: head, **arguments) -> Callable[..., Tensor]:
    def loss(hidden, head, labels, teacher_hidden, teacher_head):
        given = {"teacher_hidden": teacher_hidden, "teacher_head": teacher_head, "temperature": TEMPERATURE}
        return linear_distillation_loss(hidden, student(head), labels, **given, **arguments).loss

    return loss


def trl_divergence(hidden, head, labels, teacher_hidden, teacher_head) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    tensors = hidden, head.weight, None, teacher_hidden, teacher_head.weight, None
    per_token, _ = ChunkedDivergenceFunction.apply(*tensors, 0.0, TEMPERATURE)
    return per_token.masked_fill(labels == -100, 0).sum() / (labels != -100).sum()


CASES: dict[str, Callable[..., Tensor]] = {
    "naive full logits": naive,
    "checkpointed chunks (callable head)": ours(student=lambda head: head.__call__),
    "TRL chunked KL alone, no CE": trl_divergence,
    "ours": ours(),
    "ours + JSD": ours(terms={"ce": 0.5, "forward_kl": 0.25, "jsd": 0.25}),
    "ours + all metrics": ours(metrics=METRICS),
}


def step(case: str, data: Inputs) -> float:
    data[0].grad = data[1].weight.grad = None
    start = time.perf_counter()
    CASES[case](*data).backward()
    return time.perf_counter() - start


def peak_megabytes(case: str, args: argparse.Namespace) -> float:
    """High-water mark of resident memory over the inputs, to be taken in a fresh process."""

    def status(field: str) -> float:
        return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    step(case, inputs(args, 8))  # loads libraries and thread pools
    data = inputs(args, args.tokens)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = status("VmRSS")
    step(case, data)
    return status("VmHWM") - before


def floor(data: Inputs) -> float:
    """Both projections, the gradient of the hidden states and, for a trained head, of its weight."""
    hidden, head, labels, teacher_hidden, teacher_head = data
    kept, start = slice(0, int((labels != -100).sum())), time.perf_counter()
    with torch.no_grad():
        logits = hidden[kept] @ head.weight.t()
        products = [teacher_hidden[kept] @ teacher_head.weight.t(), logits @ head.weight]
        products += [logits.t() @ hidden[kept]] if head.weight.requires_grad else []
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 2048), ("vocabulary", 49152), ("student-width", 576), ("teacher-width", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--frozen", action="store_true", help="the student's head gets no gradient")
    parser.add_argument("--masked", type=float, default=0.0, help="share of tokens without a label")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="append to benchmarks/results/loss.json")
    parser.add_argument("--peak", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(peak_megabytes(args.peak, args))
        return
    cases = [case for case in CASES if trl_divergence is not CASES[case] or importlib.util.find_spec("trl")]
    data = inputs(args, args.tokens)
    runs = [{case: step(case, data) for case in cases} | {"floor": floor(data)} for _ in range(args.repeats + 1)]
    seconds = {case: statistics.median(run[case] for run in runs[1:]) for case in runs[0]}  # the first warms up
    peak = {}
    for case in cases:
        command = [sys.executable, __file__, *sys.argv[1:], "--peak", case]
        peak[case] = float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    print(f"{'':38}{'s':>8}{'ratio':>8}{'floor':>8}{'peak MB':>9}{'ratio':>8}")
    for case in cases:
        now, top, time_ratio, peak_ratio = seconds[case], peak[case], *(d[case] / d[cases[0]] for d in (seconds, peak))
        print(f"{case:38}{now:8.2f}{time_ratio:8.2f}{seconds['floor'] / now:8.0%}{top:9.0f}{peak_ratio:8.3f}")
    if args.write:
        row = {"settings": vars(args), "torch": torch.__version__, "seconds": seconds, "peak_mb": peak}
        rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps([*rows, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
