from __future__ import annotations

import pytest
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model

from hf_distill import KDConfig, KDTrainer, LogitObjective, ModelTeacher
from hf_distill.training.checks import check_columns, check_config, check_teacher_argument
from tests import tiny
from tests.training.runs import make_models, make_trainer


def config(tmp_path, **fields):
    return KDConfig(str(tmp_path), use_cpu=True, report_to="none", **fields)


def test_a_missing_teacher_is_found_before_the_student_is_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"`teacher_model` is missing.*load_teacher"):
        KDTrainer("no/such-student", None, config(tmp_path))


def test_a_teacher_given_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give the teacher once"):
        check_teacher_argument("one", config(tmp_path, teacher_model_name_or_path="other"))


def test_a_loaded_teacher_is_not_quantised_behind_the_users_back(tmp_path):
    with pytest.raises(ValueError, match=r"load_teacher\(name, quantization='nf4'\)"):
        check_teacher_argument(tiny.model("llama"), config(tmp_path, teacher_quantization="nf4"))


def test_a_teacher_of_another_type_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a dict"):
        check_teacher_argument({}, config(tmp_path))


def test_plain_training_arguments_are_refused_with_the_class_to_use(tmp_path):
    from transformers import TrainingArguments

    with pytest.raises(ValueError, match="expected a KDConfig"):
        check_config(TrainingArguments(str(tmp_path), use_cpu=True), KDConfig)


def test_needs_that_the_teacher_lacks_name_both_sides():
    class Mute(ModelTeacher):
        provides = frozenset()

    with pytest.raises(ValueError, match=r"LogitObjective needs.*logits.*Mute provides"):
        Mute(tiny.model()).check_objectives([LogitObjective(1.0)])


@pytest.mark.parametrize("value", [[0.5, 0.5], 0.5, [1, 0], [[0.1], [0.2]], [True, False]])
def test_numbers_that_the_collator_would_drop_are_refused(value):
    rows = Dataset.from_dict({"input_ids": [[1, 2]], "loss_mask": [value]})
    with pytest.raises(ValueError, match=r"\['loss_mask'\].*remove_columns"):
        check_columns(rows, ["input_ids", "labels"], "training")


@pytest.mark.parametrize("value", ["text", 7, ["a", "b"]])
def test_text_and_ids_may_stay_in_the_dataset(value):
    rows = Dataset.from_dict({"input_ids": [[1, 2]], "note": [value]})
    check_columns(rows, ["input_ids", "labels"], "training")


def test_a_trainer_refuses_a_column_that_would_be_dropped(tmp_path):
    trainer = make_trainer("kd", tmp_path, max_steps=1)
    rows = trainer.train_dataset
    trainer.train_dataset = rows.add_column("token_weights", [[1.0] * len(ids) for ids in rows["input_ids"]])
    with pytest.raises(ValueError, match="token_weights"):
        trainer.get_train_dataloader()


def test_the_sft_trainer_refuses_a_column_that_preparation_would_drop(tmp_path):
    trainer = make_trainer("sft", tmp_path, max_steps=1)
    rows = tiny.prompt_completion_dataset(4).add_column("token_weights", [[1.0]] * 4)
    with pytest.raises(ValueError, match="token_weights"):
        trainer.evaluate(rows)


@pytest.mark.parametrize("kind", ["kd", "sft-callback"])
def test_a_student_with_virtual_tokens_among_its_own_is_refused(kind, tmp_path):
    student, teacher = make_models()
    adapted = get_peft_model(student, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"PROMPT_TUNING adapter.*LoraConfig"):
        make_trainer(kind, tmp_path, models=(adapted, teacher))
