"""Prune, distil and quantise SmolLM2-135M-Instruct, and see what each step, and each loss, is worth.

Command:   python recipes/compress_smollm2.py --seeds 3         (--orders all runs the steps in every order instead)
Hardware:  2 CPU cores, 8 GB. Minutes: see benchmarks/LOG.md.
Result:    a folder for each run under outputs/compress, each with its stages and a card; one table, also as JSON.
"""

import argparse
import shutil
from itertools import pairwise
from pathlib import Path

import torch
from assets import pack, review_texts, smollm2
from compress_tables import draw_orders, print_table, save
from datasets import Dataset
from transformers import AutoTokenizer

from hf_distill.evaluation import KLDivergence, MultipleChoice, Perplexity, Top1Agreement
from hf_distill.pipelines import CompressConfig, CompressReport, compress


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each run, 4 rows of 128 tokens each")
parser.add_argument("--seeds", type=int, default=1)
parser.add_argument("--orders", choices=["all"], help="every order of the three steps, with 4-bit weights")
parser.add_argument("--adapt_teacher", type=int, default=0, help="also distil from a teacher trained so many steps")
parser.add_argument("--output_dir", default="outputs/compress")
flags = parser.parse_args()
root, source = Path(flags.output_dir), str(smollm2())
tokenizer = AutoTokenizer.from_pretrained(source)
texts = {split: [row.text for row in rows] for split, rows in review_texts().items()}
train = pack(texts["train"], tokenizer, 128)
halves = [text.split() for text in texts["test"] if 12 <= len(text.split()) <= 20]
items = [
    {
        "context": " ".join(words[:6]),
        "choices": [" " + " ".join(row[6:]) for row in ((words, other) if i % 2 else (other, words))],
        "answer": 1 - i % 2,
    }
    for i, (words, other) in enumerate(pairwise(halves[:121]))
]
held_out = Dataset.from_dict({"text": texts["test"][:100]})
benchmarks = [benchmark(held_out) for benchmark in (Perplexity, KLDivergence, Top1Agreement)]
benchmarks.append(MultipleChoice(Dataset.from_list(items), name="continuation"))


def run(name: str, order: str, seed: int = 0, **settings: object) -> CompressReport:
    """One pipeline; stages and measurements that another one has made of the same things are taken from there."""
    folder, first = root / f"{name}-{seed}", f"1-{order.split('-')[0]}"
    made = next(root.glob(f"*/{first}"), None)
    if made is not None and first != "1-KD" and not folder.exists():
        shutil.copytree(made, folder / first)
        shutil.copy(made.parent / "measured.json", folder)
    args = CompressConfig(
        str(folder), order=order, seed=seed, prune={"num_hidden_layers": 22, "intermediate_size": 1152},
        calibration_tokens=8192, model_kwargs={"attn_implementation": "eager"}, teacher_dtype="bfloat16",
        max_steps=flags.steps, per_device_train_batch_size=4, learning_rate=5e-4, lr_scheduler_type="cosine",
        warmup_steps=min(5, flags.steps - 1), bf16=True, use_cpu=not torch.cuda.is_available(), logging_steps=10,
        save_steps=20, save_total_limit=1, report_to="none", **settings,
    )  # fmt: skip
    return compress(source, train, args, benchmarks=benchmarks, tokenizer=tokenizer)


if flags.orders:
    orders = ("P-KD-Q", "P-Q-KD", "KD-P-Q", "Q-P-KD", "Q-KD-P", "KD-Q-P")
    rounding = {"quantization": "w4a16", "group_size": 32}
    runs = {order: [run(f"order-{order}", order, seed, **rounding) for seed in range(flags.seeds)] for order in orders}
    models = {order: [report.rows[-1] for report in reports] for order, reports in runs.items()}
    draw_orders(models, root)
else:
    losses = {"CE": (1.0, 0.0), "KD": (0.0, 1.0), "CE + KD": (0.5, 0.5)}
    models = {}
    for seed in range(flags.seeds):
        for name, (ce, kd) in losses.items():
            steps = run(name.replace(" ", ""), "P-KD-Q", seed, ce_weight=ce, kd_weight=kd).rows
            labels = ["before", "pruned", f"pruned + {name}", f"pruned + {name} + int8"]
            for label, row in zip(labels, steps, strict=True):
                models.setdefault(label, {})[seed if row.name[0] in "23" else 0] = row
        if flags.adapt_teacher:
            settings = {"ce_weight": 0.0, "kd_weight": 1.0, "adapt_teacher": flags.adapt_teacher}
            steps = run("adapted", "P-KD-Q", seed, **settings).rows
            models.setdefault("adapted teacher", {})[seed] = steps[1]
            models.setdefault("pruned + KD, adapted teacher", {})[seed] = steps[3]
    models = {label: list(rows.values()) for label, rows in models.items()}
save(models, root / ("orders.json" if flags.orders else "table.json"))
print_table(models)
