"""The trainers. `KDSFTTrainer` lives in `hf_distill.training.sft`, so that only its users import TRL."""
