"""`hf-distill plan`: what a distillation needs, from two configs alone."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_distill.planning import Way

# Achieved by one GPU in bf16: about 40 % of what an H100 can do at most.
TFLOPS = 400.0


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser's."""
    plan = commands.add_parser("plan", help="memory, FLOPs, hours and bytes of a run, and which ways of it fit")
    plan.add_argument("--teacher", required=True, help="Hub name, folder or config.json; no weights are read")
    plan.add_argument("--student", required=True, help="the same")
    plan.add_argument(
        "--candidates", nargs="+", default=[], metavar="NAME",
        help="models that could stand between a teacher and a student over 10 times smaller",
    )  # fmt: skip
    plan.add_argument("--tokens", type=float, default=1e9, help="tokens to train on (default: 1e9)")
    plan.add_argument("--gpus", type=int, default=1, help="how many (default: 1)")
    plan.add_argument("--gpu-memory", type=float, default=80.0, help="of each, in GiB (default: 80)")
    plan.add_argument("--tflops", type=float, default=TFLOPS, help="of each, achieved in bf16 (default: %(default)g)")
    plan.add_argument("--batch", type=int, default=1, help="sequences of a micro-batch of a GPU (default: 1)")
    plan.add_argument("--accumulate", type=int, default=8, help="micro-batches of an optimizer step (default: 8)")
    plan.add_argument("--length", type=int, default=2048, help="tokens of a sequence (default: 2048)")
    plan.add_argument("--lora-rank", type=int, default=16, help="of the adapters that are tried (default: 16)")
    plan.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> int:
    from hf_distill.cli.models import config_of
    from hf_distill.planning import parameter_count, ways

    for flag in ("tokens", "tflops", "gpu_memory"):
        value = getattr(options, flag)
        if not 0 < value < math.inf:
            raise ValueError(f"`--{flag.replace('_', '-')}` is {value:g}; expected a number above 0.")
    for flag in ("gpus", "batch", "accumulate", "length", "lora_rank"):
        value = getattr(options, flag)
        if value < 1:
            raise ValueError(f"`--{flag.replace('_', '-')}` is {value}; expected a whole number of at least 1.")
    configs = config_of(options.teacher, "--teacher"), config_of(options.student, "--student")
    candidates = {name: parameter_count(config_of(name, "--candidates")).total for name in options.candidates}
    settings = {
        "per_device_batch_size": options.batch,
        "sequence_length": options.length,
        "gradient_accumulation_steps": options.accumulate,
        "candidates": candidates,
    }
    known = ways(*configs, gpus=options.gpus, gpu_memory=options.gpu_memory, lora_rank=options.lora_rank, **settings)
    chosen = next((way for way in known if way.fits), None)
    print(
        f"Peak of each GPU. Of its {options.gpu_memory:g} GiB a plan may take {known[0].usable_bytes / 2**30:.1f}: "
        "the CUDA context, NCCL and\nfragmentation have the rest.\n"
    )
    print("\n".join(map(str, known)))
    if chosen is None:
        smallest = min(known, key=lambda way: way.plan.bytes_per_rank)
        print(f"\nNothing fits. {_way_out(smallest, configs, options, settings)}")
        for note in smallest.plan.notes:
            print(f"\nNote: {note}")
        return 1
    print(f"\nThe first that fits: accelerate launch {chosen.flags} {_trainer_flags(options)}\n")
    if chosen.cached:
        print(
            "Make the soft labels first, once, where the teacher does fit:\n  hf-distill cache build --teacher "
            f"{options.teacher} --dataset DATA --out FOLDER --encoding base\nThey know nothing of hidden states and "
            "attention: only losses on logits can use them.\n"
        )
    print(chosen.plan)
    _print_totals(chosen, known[0].plan.flops["teacher forward"], options)
    return 0


def _trainer_flags(options: argparse.Namespace) -> str:
    return (
        f"--per_device_train_batch_size {options.batch} --gradient_accumulation_steps {options.accumulate} "
        f"--max_length {options.length} --gradient_checkpointing true --bf16 true --teacher_dtype bfloat16"
    )


def _way_out(smallest: Way, configs: tuple[Any, Any], options: argparse.Namespace, settings: dict[str, Any]) -> str:
    """What would fit: more GPUs of this kind, or a larger one."""
    from hf_distill.planning import ways

    needed = smallest.plan.bytes_per_rank / 2**30 * options.gpu_memory / (smallest.usable_bytes / 2**30)
    text = f"{smallest.name} comes nearest: it needs GPUs of {needed:.0f} GiB."
    for gpus in (count for count in (2, 4, 8, 16, 32, 64) if count > options.gpus):
        more = ways(*configs, gpus=gpus, gpu_memory=options.gpu_memory, lora_rank=options.lora_rank, **settings)
        fitting = next((way for way in more if way.fits), None)
        if fitting is not None:
            return f"{text} With {gpus} GPUs this fits: {fitting.name}. Or take a shorter --length."
    return f"{text} More GPUs of this kind do not help; take a shorter --length or a smaller student."


def _print_totals(chosen: Way, teacher_flops: float, options: argparse.Namespace) -> None:
    """Hours, and bytes of soft labels."""
    from hf_distill.cache.registry import BUDGETS

    def hours(flops: float) -> str:
        total = flops * options.tokens / (options.tflops * 1e12) / 3600
        return f"{flops * options.tokens / 1e18:,.3g} EFLOP, {total:,.3g} GPU hours"

    print(
        f"\n{options.tokens:,.0f} tokens: {hours(chosen.plan.flops_per_token)}, {options.gpus} at a time. Assumed: "
        f"{options.tflops:g} TFLOP/s achieved by each\n(--tflops: 400 is 40 % of an H100's peak in bf16), nothing "
        "waits for data or other GPUs."
    )
    if chosen.cached:
        print(f"Making the soft labels, once: {hours(teacher_flops)}.")
    sizes = (f"{name} {budget * options.tokens / 1e9:,.3g} GB" for name, budget in BUDGETS.items())
    print(f"Soft labels on disk, at most, by preset of `hf-distill cache build --encoding`: {', '.join(sizes)}.")
