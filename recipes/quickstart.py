"""Distil SmolLM2-135M-Instruct into a student cut from its own layers, and see what distillation adds.

Command:   make quickstart     (ARGS=--lora trains an adapter of the student instead, ARGS="--steps 120" longer)
Hardware:  2 CPU cores, 8 GB. Minutes: 10 on one thread beside other work, of which 6 of processor time.
Result:    the student, its tokenizer and its card with plots in outputs/quickstart (the card of such a run:
           model_cards/quickstart); a table against the student before training and against cross-entropy alone.
"""

import argparse

import torch
from assets import pack, review_texts, smollm2
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, default_data_collator

from hf_distill import KDConfig, KDTrainer, cards, load_teacher
from hf_distill.evaluation import KLDivergence, Perplexity, Top1Agreement
from hf_distill.students import choose_layers, shrink


parser = argparse.ArgumentParser()
parser.add_argument("--lora", action="store_true", help="train an adapter of the student")
parser.add_argument("--steps", type=int, default=24, help="optimizer steps of each run, 8 rows of 128 tokens each")
parser.add_argument("--output_dir", default="outputs/quickstart")
flags = parser.parse_args()
attention = "sdpa" if torch.cuda.is_available() else "eager"  # bf16 SDPA has a slow backward on CPUs
teacher = load_teacher(str(smollm2()), dtype="bfloat16", attn_implementation=attention)
texts = {split: [row.text for row in rows] for split, rows in review_texts().items()}
train = pack(texts["train"], teacher.tokenizer, 128).select(range(flags.steps * 8))
held_out = Dataset.from_dict({"text": texts["test"][:300]})
benchmarks = [benchmark(held_out) for benchmark in (Perplexity, KLDivergence, Top1Agreement)]
depth = teacher.model.config.num_hidden_layers
layers = choose_layers(depth, depth * 2 // 3, keep_first=depth // 2, keep_last=depth // 6)  # 15 and 5 of 30


def train_student(folder: str, ce_weight: float, kd_weight: float) -> KDTrainer:
    """Train the same student on the same rows in the same order."""
    print(f"\nTraining {folder}: cross-entropy x {ce_weight:g} + forward KL x {kd_weight:g}")
    args = KDConfig(
        folder, ce_weight=ce_weight, kd_weight=kd_weight, max_steps=flags.steps, per_device_train_batch_size=8,
        learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=min(5, flags.steps - 1),
        bf16=True, use_cpu=not torch.cuda.is_available(), logging_steps=10, save_strategy="no", report_to="none",
    )  # fmt: skip
    student, adapter = shrink(teacher.model, layers=layers, dtype=torch.float32), None
    if flags.lora:  # the adapter is saved alone, so the base that it belongs to gets a folder of its own
        student.save_pretrained(f"{folder}/base")
        student = AutoModelForCausalLM.from_pretrained(f"{folder}/base", attn_implementation=attention)
        adapter = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    data = {"train_dataset": train, "data_collator": default_data_collator, "processing_class": teacher.tokenizer}
    trainer = KDTrainer(student, teacher, args, peft_config=adapter, **data)
    trainer.train()
    trainer.model.to(torch.bfloat16)  # what is measured is what is saved, in the teacher's precision
    return trainer


alone = train_student(f"{flags.output_dir}/cross-entropy", 1.0, 0.0).model
distilled = train_student(flags.output_dir, 0.5, 0.5)
distilled.save_model()
before = shrink(teacher.model, layers=layers)
print(distilled.evaluate_retention(benchmarks, {"before distillation": before, "cross-entropy only": alone}))
distilled.create_model_card(
    model_name="SmolLM2-135M-Instruct, distilled", base_model="HuggingFaceTB/SmolLM2-135M-Instruct", language="en",
    teacher="HuggingFaceTB/SmolLM2-135M-Instruct", license="apache-2.0", teacher_license="apache-2.0",
    datasets=[cards.Dataset("review and editorial snippets (VADER, 2014)", "mit", "movies, products, New York Times")],
    evaluation_data=f"{len(held_out)} held-out snippets", tokens=flags.steps * 8 * 127,
    baseline="the same student before training, and trained on the same tokens by cross-entropy alone",
    commands=[f'make quickstart ARGS="--steps {flags.steps}{" --lora" * flags.lora}"'],
)  # fmt: skip
print(f"The card: {flags.output_dir}/README.md")
