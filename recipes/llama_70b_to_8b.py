"""Distil Llama 3.1 70B Instruct into Llama 3.1 8B on chats.

Command:   accelerate launch --config_file recipes/accelerate/fsdp2.yaml recipes/llama_70b_to_8b.py \
               --output_dir llama-8b-distilled [--config settings.yaml] [--push_to_hub]
           zero3.yaml shards with DeepSpeed instead; ddp.yaml with --teacher_quantization nf4 keeps a 4-bit teacher on
           every rank, which leaves room for an adapter: add --lora_rank 16.
Hardware:  8 GPUs with 80 GB each. Minutes: not measured; the plan printed first gives FLOPs and memory per rank.
Result:    a student that loads with `from_pretrained`, its retention on held-out chats, and its card.
Rehearsal: accelerate launch recipes/llama_70b_to_8b.py --rehearse     (also with --multi_gpu --num_processes 2)
           the whole recipe on tiny models of the same architecture, after the plan of the real run.
"""

from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from datasets import load_dataset
from peft import LoraConfig
from rehearsal import LLAMA_8B, LLAMA_70B, chat_dataset, rehearsal_config, tiny_llama
from trl import TrlParser

from hf_distill import KDSFTConfig, KDSFTTrainer, load_teacher
from hf_distill.evaluation import KLDivergence, Perplexity, Top1Agreement
from hf_distill.planning import plan


@dataclass
class Recipe:
    """What this recipe adds to the trainer's config."""

    student: str = field(default="meta-llama/Llama-3.1-8B", metadata={"help": "Base model of the student."})
    teacher: str = field(default="meta-llama/Llama-3.1-70B-Instruct", metadata={"help": "Teacher."})
    dataset: str = field(default="allenai/tulu-3-sft-mixture", metadata={"help": "Dataset with a `messages` column."})
    lora_rank: int = field(default=0, metadata={"help": "Rank of an adapter; 0 trains the whole student."})
    ranks: int = field(default=8, metadata={"help": "GPUs of the real run, for the plan."})
    sharding: str = field(default="fsdp2", metadata={"help": "ddp, fsdp2 or zero3, for the plan."})
    rehearse: bool = field(default=False, metadata={"help": "Run everything on tiny models, on the CPU."})


def main(recipe: Recipe, args: KDSFTConfig) -> None:
    """Plan, train, measure, save."""
    adapter = LoraConfig(r=recipe.lora_rank, target_modules="all-linear") if recipe.lora_rank else None
    if PartialState().is_main_process:
        print(plan(
            LLAMA_70B, LLAMA_8B, world_size=recipe.ranks, sharding=recipe.sharding, peft_config=adapter,
            per_device_batch_size=args.per_device_train_batch_size, sequence_length=args.max_length or 2048,
            teacher_quantization=args.teacher_quantization,
        ))  # fmt: skip
    tokenizer = None
    if recipe.rehearse:
        args = rehearsal_config(args)
        (student, tokenizer), (teacher, _) = tiny_llama(layers=1), tiny_llama(layers=2)
        chats = chat_dataset(16)
    else:
        quantization, args.teacher_quantization = args.teacher_quantization, None
        student, teacher = recipe.student, load_teacher(recipe.teacher, quantization=quantization, dtype="bfloat16")
        chats = load_dataset(recipe.dataset, split="train").select_columns("messages")
        # The base model has no chat template; the student is to speak the teacher's.
        tokenizer = teacher.tokenizer
    parts = chats.train_test_split(test_size=min(500, len(chats) // 4), seed=0)
    trainer = KDSFTTrainer(
        student, teacher, args, train_dataset=parts["train"], eval_dataset=parts["test"],
        processing_class=tokenizer, peft_config=adapter,
    )  # fmt: skip
    trainer.train()
    held_out = trainer.eval_dataset
    report = trainer.evaluate_retention([Perplexity(held_out), KLDivergence(held_out), Top1Agreement(held_out)])
    trainer.accelerator.print(report)
    trainer.save_model()
    trainer.create_model_card(dataset_name=None if recipe.rehearse else recipe.dataset)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=recipe.dataset)


if __name__ == "__main__":
    parser = TrlParser((Recipe, KDSFTConfig))
    parser.set_defaults(use_cpu=not torch.cuda.is_available())
    main(*parser.parse_args_and_config())
