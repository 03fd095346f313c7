"""Distil SmolLM2-135M-Instruct into a student cut from its own layers, and see what distillation adds.

Command:   make quickstart              (make quickstart ARGS=--lora trains an adapter of the student instead)
Hardware:  2 CPU cores, 8 GB. Minutes: planned for 10, not measured yet.
Result:    outputs/quickstart holds the student, its tokenizer and its card. A table compares it with the same student
           trained on the same tokens by cross-entropy alone: perplexity, KL and agreement on held-out reviews.
"""

import argparse
from pathlib import Path

import torch
from assets import pack, review_texts, smollm2
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, default_data_collator

from hf_distill import KDConfig, KDTrainer, cards, evaluate_retention, load_teacher
from hf_distill.evaluation import KLDivergence, Perplexity, Top1Agreement, tokens_per_second
from hf_distill.evaluation.tables import markdown_table
from hf_distill.students import choose_layers, shrink


parser = argparse.ArgumentParser()
parser.add_argument("--lora", action="store_true", help="train an adapter of the student")
parser.add_argument("--steps", type=int, default=120, help="optimizer steps of each run, 8 rows of 128 tokens each")
parser.add_argument("--output_dir", type=Path, default=Path("outputs/quickstart"))
flags = parser.parse_args()
# On the CPU the backward of PyTorch's bf16 flash attention takes more time than all the rest of a step.
attention = "sdpa" if torch.cuda.is_available() else "eager"
teacher = load_teacher(str(smollm2()), dtype="bfloat16", attn_implementation=attention)
tokenizer = teacher.tokenizer
texts = {split: [row.text for row in rows] for split, rows in review_texts().items()}
train = pack(texts["train"], tokenizer, 128).select(range(flags.steps * 8))
held_out = Dataset.from_dict({"text": texts["test"][:300]})
benchmarks = [benchmark(held_out) for benchmark in (Perplexity, KLDivergence, Top1Agreement)]
depth = teacher.model.config.num_hidden_layers
layers = choose_layers(depth, depth * 2 // 3, keep_first=depth * 2 // 3 - 3, keep_last=3)


def train_student(folder: Path, ce_weight: float, kd_weight: float) -> KDTrainer:
    """Train the same student on the same rows in the same order."""
    print(f"\nTraining {folder}: cross-entropy x {ce_weight:g} + forward KL x {kd_weight:g}")
    args = KDConfig(
        str(folder), ce_weight=ce_weight, kd_weight=kd_weight, max_steps=flags.steps, per_device_train_batch_size=8,
        learning_rate=1e-3 if flags.lora else 3e-4, lr_scheduler_type="cosine", warmup_steps=min(5, flags.steps - 1),
        bf16=True, use_cpu=not torch.cuda.is_available(), logging_steps=10, save_strategy="no", report_to="none",
    )  # fmt: skip
    student, adapter = shrink(teacher.model, layers=layers, dtype=torch.float32), None
    if flags.lora:  # the adapter is saved alone, so the base that it belongs to gets a folder of its own
        student.save_pretrained(folder / "base")
        student = AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation=attention)
        adapter = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    data = {"train_dataset": train, "data_collator": default_data_collator, "processing_class": tokenizer}
    trainer = KDTrainer(student, teacher, args, peft_config=adapter, **data)
    trainer.train()
    trainer.model.to(torch.bfloat16)  # what is measured is what is saved, in the teacher's precision
    return trainer


alone = train_student(flags.output_dir / "cross-entropy", 1.0, 0.0).model
distilled = train_student(flags.output_dir, 0.5, 0.5)
before = shrink(teacher.model, layers=layers)
start = evaluate_retention(before, teacher, benchmarks, tokenizer)
report = distilled.evaluate_retention(benchmarks, baseline=alone)
measured = {
    "teacher": (teacher.model, [row.teacher for row in report.rows]),
    "student before": (before, [row.student for row in start.rows]),
    "cross-entropy only": (alone, [row.baseline for row in report.rows]),
    "distilled": (distilled.model, [row.student for row in report.rows]),
}
sample, table = torch.tensor(train[:8]["input_ids"]), []
for name, (model, values) in measured.items():
    table.append([name, *values, model.num_parameters() / 1e6, round(tokens_per_second(model, sample))])
columns = ["model", "perplexity", "KL to the teacher", "top-1 agreement", "parameters (M)", "tokens/s"]
print(markdown_table(columns, table))
distilled.save_model()
distilled.create_model_card(
    model_name="SmolLM2-135M-Instruct, distilled", base_model="HuggingFaceTB/SmolLM2-135M-Instruct", language="en",
    teacher="HuggingFaceTB/SmolLM2-135M-Instruct", license="apache-2.0", teacher_license="apache-2.0",
    datasets=[cards.Dataset("review and editorial snippets (VADER, 2014)", "mit", "movies, products, New York Times")],
    evaluation_data=f"{len(held_out)} held-out snippets", tokens=flags.steps * 8 * 127,
    baseline="the same student, trained on the same tokens by cross-entropy alone",
    comparison=cards.Table(columns, table, "tokens/s: forward passes in bf16 on the machine that trained it."),
    commands=["make quickstart ARGS=--lora" if flags.lora else "make quickstart"],
)  # fmt: skip
print(f"Saved {flags.output_dir}: the student, its tokenizer and its card.")
