"""`hf-distill plan`: what a distillation needs, from two configs alone."""

from __future__ import annotations

import argparse
from typing import Any


# Achieved by one GPU in bf16: about 40 % of what an H100 can do at most.
TFLOPS = 400.0


def add_to(commands: Any) -> None:
    """Add the subcommand to a parser's."""
    plan = commands.add_parser("plan", help="memory, FLOPs, hours and bytes of a run, and which ways of it fit")
    plan.add_argument("--teacher", required=True, help="Hub name, folder or config.json; no weights are read")
    plan.add_argument("--student", required=True, help="the same")
    plan.add_argument("--tokens", type=float, default=1e9, help="tokens to train on (default: 1e9)")
    plan.add_argument("--gpus", type=int, default=1, help="how many (default: 1)")
    plan.add_argument("--gpu-memory", type=float, default=80.0, help="of each, in GiB (default: 80)")
    plan.add_argument("--tflops", type=float, default=TFLOPS, help="of each, achieved in bf16 (default: %(default)g)")
    plan.add_argument("--batch", type=int, default=1, help="sequences of a micro-batch of a GPU (default: 1)")
    plan.add_argument("--length", type=int, default=2048, help="tokens of a sequence (default: 2048)")
    plan.add_argument("--lora-rank", type=int, default=16, help="of the adapters that are tried (default: 16)")
    plan.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> int:
    from hf_distill.planning import ways

    if min(options.tokens, options.tflops) <= 0:
        raise ValueError(f"`--tokens` is {options.tokens:g} and `--tflops` {options.tflops:g}; expected more than 0.")
    configs = _config(options.teacher), _config(options.student)
    settings = {"per_device_batch_size": options.batch, "sequence_length": options.length}
    known = ways(*configs, gpus=options.gpus, gpu_memory=options.gpu_memory, lora_rank=options.lora_rank, **settings)
    chosen = next((way for way in known if way.fits), None)
    print(f"{'Peak of a rank':<52}{'needed':>13}")
    print("\n".join(map(str, known)))
    if chosen is None:
        smallest = min(known, key=lambda way: way.plan.bytes_per_rank)
        print(f"\nNothing fits into {options.gpu_memory:g} GiB; {smallest.name} comes nearest. Take more GPUs, or "
              "a shorter --length.")  # fmt: skip
    else:
        print(f"\nThe first that fits: accelerate launch {chosen.flags}\n\n{chosen.plan}")
        _print_totals(chosen.plan.flops_per_token * options.tokens, options)
    return 0 if chosen else 1


def _print_totals(flops: float, options: argparse.Namespace) -> None:
    """Hours, and bytes of soft labels."""
    from hf_distill.cache.registry import BUDGETS

    hours = flops / (options.tflops * 1e12) / 3600
    print(f"\n{options.tokens:,.0f} tokens: {flops / 1e18:,.3g} EFLOP, {hours:,.3g} GPU hours at {options.tflops:g} "
          f"TFLOP/s, {hours / options.gpus:,.3g} on {options.gpus} GPUs")  # fmt: skip
    sizes = (f"{name} {budget * options.tokens / 1e9:,.3g} GB" for name, budget in BUDGETS.items())
    print(f"soft labels on disk, at most: {', '.join(sizes)}")


def _config(name: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(name)
