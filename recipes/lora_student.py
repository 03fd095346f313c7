"""Train a LoRA student on chats against a 4-bit teacher.

Command:   accelerate launch recipes/lora_student.py --output_dir qwen3-0.6b-lora [--push_to_hub]
Hardware:  one GPU with 24 GB: the student in bf16 with an adapter, the 8B teacher in nf4 (about 6 GB).
Minutes:   not measured. Result: an adapter of Qwen3-0.6B, a card, and retention on held-out chats.
Rehearsal: python recipes/lora_student.py --rehearse    (tiny models, CPU, under a minute)
"""

from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from peft import LoraConfig
from rehearsal import chat_dataset, rehearsal_config, tiny_llama
from trl import TrlParser

from hf_distill import KDSFTConfig, KDSFTTrainer, load_teacher
from hf_distill.evaluation import KLDivergence, Perplexity, Top1Agreement


@dataclass
class Recipe:
    """What this recipe adds to the trainer's config."""

    student: str = field(default="Qwen/Qwen3-0.6B", metadata={"help": "Model that gets the adapter."})
    teacher: str = field(default="Qwen/Qwen3-8B", metadata={"help": "Teacher, loaded in nf4."})
    dataset: str = field(default="HuggingFaceTB/smoltalk2", metadata={"help": "Dataset with a `messages` column."})
    dataset_config: str = field(default="SFT", metadata={"help": "Its configuration."})
    split: str = field(default="smoltalk_smollm3_everyday_conversations_no_think", metadata={"help": "Its split."})
    rank: int = field(default=16, metadata={"help": "Rank of the adapter."})
    rehearse: bool = field(default=False, metadata={"help": "Run everything on tiny models, on the CPU."})


def main(recipe: Recipe, args: KDSFTConfig) -> None:
    """Train, measure, save."""
    tokenizer = None
    if recipe.rehearse:
        args = rehearsal_config(args)
        (student, tokenizer), (teacher, _) = tiny_llama(layers=1), tiny_llama(layers=2)
        chats = chat_dataset(16)
    else:
        student, teacher = recipe.student, load_teacher(recipe.teacher, quantization="nf4")
        chats = load_dataset(recipe.dataset, recipe.dataset_config, split=recipe.split).select_columns("messages")
    parts = chats.train_test_split(test_size=min(200, len(chats) // 4), seed=0)
    trainer = KDSFTTrainer(
        student,
        teacher,
        args,
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        processing_class=tokenizer,
        peft_config=LoraConfig(r=recipe.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    held_out = trainer.eval_dataset
    print(trainer.evaluate_retention([Perplexity(held_out), KLDivergence(held_out), Top1Agreement(held_out)]))
    trainer.save_model()
    trainer.create_model_card(dataset_name=None if recipe.rehearse else recipe.dataset)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=recipe.dataset)


if __name__ == "__main__":
    parser = TrlParser((Recipe, KDSFTConfig))
    parser.set_defaults(use_cpu=not torch.cuda.is_available())
    main(*parser.parse_args_and_config())
