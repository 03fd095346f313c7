"""Prune, distil and quantise SmolLM2-135M-Instruct, and see what each step, and each loss, is worth.

Command:   python recipes/compress_smollm2.py --seeds 3         (--orders all runs the steps in every order instead)
Hardware:  2 CPU cores, 8 GB. Minutes: 4 to 6 for each run on one shared core.
Result:    a folder for each run under outputs/compress, each with its stages and a card in the last one (that of
           CE+KD-0: model_cards/compress_smollm2); one table, also as JSON.
"""

import argparse
import shutil
from itertools import permutations
from pathlib import Path

from compress_data import TEACHER, TOKENIZER, TRAIN, benchmarks, card, settings
from compress_tables import draw_orders, print_table, save

from hf_distill.pipelines import CompressConfig, CompressReport, compress


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each run, 4 rows of 128 tokens each")
parser.add_argument("--seeds", type=int, default=1)
parser.add_argument("--orders", choices=["all"], help="every order of the three steps, with 4-bit weights")
parser.add_argument("--adapt_teacher", type=int, default=0, help="also distil from a teacher trained so many steps")
parser.add_argument("--output_dir", default="outputs/compress")
flags = parser.parse_args()
root, measured = Path(flags.output_dir), benchmarks()


def run(name: str, order: str, seed: int = 0, **changed: object) -> CompressReport:
    """One pipeline. A first stage that another one has made of the same things is taken from there."""
    folder, first = root / f"{name}-{seed}", f"1-{order.split('-')[0]}"
    made = next(root.glob(f"*/{first}"), None)
    if made is not None and first != "1-KD" and not folder.exists():
        shutil.copytree(made, folder / first)
        shutil.copy(made.parent / "measured.json", folder)
    args = CompressConfig(str(folder), order=order, **(settings(flags.steps, seed) | changed))
    command = f"python recipes/compress_smollm2.py --steps {flags.steps} --seeds {seed + 1}"
    command += " --orders all" * bool(flags.orders) + f" --adapt_teacher {args.adapt_teacher}" * bool(
        args.adapt_teacher
    )
    facts = card(order, flags.steps, f"{command}  # the model in {name}-{seed}")
    return compress(TEACHER, TRAIN, args, benchmarks=measured, tokenizer=TOKENIZER, card=facts)


models: dict[str, list] = {}
if flags.orders:
    for order in ("-".join(steps) for steps in permutations(("P", "KD", "Q"))):
        rounding = {"quantization": "w4a16", "group_size": 32}
        reports = [run(f"order-{order}", order, seed, **rounding) for seed in range(flags.seeds)]
        models[order] = [report.rows[-1] for report in reports]
    draw_orders(models, root)
else:
    for seed in range(flags.seeds):
        for name, weights in {"CE": (1.0, 0.0), "KD": (0.0, 1.0), "CE + KD": (0.5, 0.5)}.items():
            losses = dict(zip(("ce_weight", "kd_weight"), weights, strict=True))
            before, pruned, trained, rounded = run(name.replace(" ", ""), "P-KD-Q", seed, **losses).rows
            models |= {"before": [before], "pruned": [pruned]}
            models.setdefault(f"pruned + {name}", []).append(trained)
            models.setdefault(f"pruned + {name} + int8", []).append(rounded)
        if flags.adapt_teacher:
            losses = {"ce_weight": 0.0, "kd_weight": 1.0, "adapt_teacher": flags.adapt_teacher}
            _, adapted, _, trained, _ = run("adapted", "P-KD-Q", seed, **losses).rows
            models.setdefault("adapted teacher", []).append(adapted)
            models.setdefault("pruned + KD, adapted teacher", []).append(trained)
save(models, root / ("orders.json" if flags.orders else "table.json"))
print_table(models)
