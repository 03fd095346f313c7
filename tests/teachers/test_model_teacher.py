from __future__ import annotations

import json

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn

from hf_distill.signals import Signal
from hf_distill.teachers import ModelTeacher, Teacher, check_not_student, check_same_task
from tests import tiny


LOGITS = frozenset({Signal.LOGITS})


def batch_of(rows: int = 2, length: int = 7, high: int = 290) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, high, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def logits_of(teacher: Teacher, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    projection = teacher.signals(batch, LOGITS).logits
    return projection.head(projection.hidden)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "bert", "roberta"])
def test_the_projection_gives_the_logits_of_the_model(family):
    model, batch = tiny.model(family), batch_of()
    expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(logits_of(ModelTeacher(model), batch), expected)


@pytest.mark.parametrize("family", ["llama", "distilbert"])
def test_a_classifier_gives_its_logits_as_they_are(family):
    model, batch = tiny.model(family, task="sequence_classification", num_labels=3), batch_of()
    projection = ModelTeacher(model).signals(batch | {"labels": torch.tensor([0, 2])}, LOGITS).logits
    assert projection.hidden.shape == (2, 3)
    expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(projection.head(projection.hidden), expected)


def test_the_teacher_is_frozen_and_gives_no_graph():
    model = tiny.model().train()
    teacher = ModelTeacher(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    projection = teacher.signals(batch_of(), LOGITS).logits
    assert not projection.hidden.requires_grad
    assert not projection.hidden.is_inference()  # an inference tensor could not be saved for the student's backward
    assert not isinstance(teacher, nn.Module)  # else assigning it to a module would put it into its state dict


def test_dropout_stays_off_when_somebody_calls_train():
    model = tiny.model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    teacher = ModelTeacher(model)
    expected = logits_of(teacher, batch_of())
    model.train()
    torch.testing.assert_close(logits_of(teacher, batch_of()), expected)
    assert not any(module.training for module in model.modules())


def test_the_batch_is_left_as_it_was_and_labels_are_not_passed_on(monkeypatch):
    model, batch = tiny.model(), batch_of()
    teacher, seen = ModelTeacher(model), {}
    forward = model.forward

    def spy(input_ids=None, attention_mask=None, labels=None, use_cache=None):
        seen.update(labels=labels, use_cache=use_cache)
        return forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    monkeypatch.setattr(model, "forward", spy)
    before = {key: value.clone() for key, value in batch.items()}
    teacher.signals(batch | {"seq_lengths": [7, 7], "completion_mask": batch["labels"]}, LOGITS)
    assert seen == {"labels": None, "use_cache": False}
    assert all(torch.equal(batch[key], before[key]) for key in before)


def test_padding_is_inert():
    teacher, batch = ModelTeacher(tiny.model()), batch_of(rows=1)
    padded = {key: torch.cat([value, torch.zeros(1, 3, dtype=value.dtype)], 1) for key, value in batch.items()}
    torch.testing.assert_close(logits_of(teacher, padded)[:, :7], logits_of(teacher, batch), atol=1e-6, rtol=1e-5)


# The mask of OPT does not look at the positions, in transformers itself: there packed documents do see each other.
@pytest.mark.parametrize("family", [family for family in tiny.DECODERS if family != "opt"])
def test_documents_of_a_packed_row_do_not_see_each_other(family):
    teacher, batch = ModelTeacher(tiny.model(family, layers=1)), batch_of(rows=2, length=6)
    positions = torch.arange(6).expand(2, 6)
    packed = {"input_ids": batch["input_ids"].view(1, 12), "position_ids": positions.reshape(1, 12)}
    separate = logits_of(teacher, {"input_ids": batch["input_ids"], "position_ids": positions})
    torch.testing.assert_close(logits_of(teacher, packed).view(2, 6, -1), separate, atol=1e-6, rtol=1e-5)


def test_a_teacher_that_cannot_tell_packed_documents_apart_is_refused(monkeypatch):
    model = tiny.model()
    teacher, forward = ModelTeacher(model), model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, attention_mask=None: forward(input_ids, attention_mask))
    batch = batch_of() | {"position_ids": torch.arange(7).expand(2, 7)}
    teacher.signals(batch, LOGITS)  # the mask says where a row begins
    del batch["attention_mask"]
    with pytest.raises(ValueError, match=r"\['position_ids'\].*attend to one another.*packing=False"):
        teacher.signals(batch, LOGITS)
    bounds = {"input_ids": batch["input_ids"], "cu_seq_lens_q": torch.tensor([0, 3, 7])}
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        teacher.signals(bounds, LOGITS)


def test_token_types_are_dropped_where_the_teacher_has_none():
    teacher = ModelTeacher(tiny.model("distilbert"))
    batch = batch_of()
    expected = logits_of(teacher, batch)
    torch.testing.assert_close(logits_of(teacher, batch | {"token_type_ids": torch.ones(2, 7).long()}), expected)


def test_inputs_that_change_the_reading_are_never_dropped():
    with pytest.raises(ValueError, match=r"does not take \['pixel_values'\]"):
        ModelTeacher(tiny.model()).signals(batch_of() | {"pixel_values": torch.ones(1, 3)}, LOGITS)


def test_a_signal_that_is_not_provided_raises_and_names_both_sides():
    class Mute(ModelTeacher):
        provides = frozenset()

    with pytest.raises(ValueError, match=r"asks for \['logits'\], but Mute provides only \[\]"):
        Mute(tiny.model()).signals(batch_of(), LOGITS)


def test_nothing_is_computed_when_nothing_is_needed():
    assert ModelTeacher(tiny.model()).signals(batch_of(), frozenset()).logits is None


def test_a_token_that_the_teacher_has_never_seen_raises_where_it_is_read():
    teacher, batch = ModelTeacher(tiny.model(vocab_size=310), name="old"), batch_of()
    batch["input_ids"][1, 3] = 310
    with pytest.raises(ValueError, match=r"token id 310, but the teacher \(old\) knows only ids below 310"):
        teacher.signals(batch, LOGITS)


def test_a_label_that_the_teacher_has_never_seen_raises():
    teacher, batch = ModelTeacher(tiny.model("bert"), tiny.tokenizer()), batch_of()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    batch["labels"][0, 0] = 319  # a row of the embedding that belongs to no token
    with pytest.raises(ValueError, match="token id 319"):
        teacher.signals(batch, LOGITS)


def test_padding_beyond_the_teachers_embedding_is_inert():
    teacher, batch = ModelTeacher(tiny.model(vocab_size=310)), batch_of(rows=1)
    padded = {key: torch.cat([value, torch.zeros(1, 2, dtype=value.dtype)], 1) for key, value in batch.items()}
    padded["input_ids"][0, 7:] = 311
    padded["labels"][0, 7:] = -100
    torch.testing.assert_close(logits_of(teacher, padded)[:, :7], logits_of(teacher, batch), atol=1e-6, rtol=1e-5)
    assert padded["input_ids"][0, -1] == 311


def test_the_students_autocast_does_not_reach_the_teacher():
    teacher, batch = ModelTeacher(tiny.model()), batch_of()
    expected = teacher.signals(batch, LOGITS).logits.hidden
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = teacher.signals(batch, LOGITS).logits.hidden
    assert hidden.dtype == torch.float32
    assert torch.equal(hidden, expected)


def test_a_bfloat16_teacher_stays_bfloat16_beside_an_fp32_student():
    projection = ModelTeacher(tiny.model().bfloat16()).signals(batch_of(), LOGITS).logits
    assert projection.hidden.dtype == projection.head(projection.hidden).dtype == torch.bfloat16


def test_the_card_has_facts_and_no_path(tmp_path):
    model = tiny.model()
    card = ModelTeacher(model, name=str(tmp_path / "my-teacher")).config_for_card()
    assert card == {
        "name": "my-teacher",
        "architecture": "LlamaForCausalLM",
        "parameters": model.num_parameters(),
        "dtype": "float32",
    }
    assert json.dumps(card)
    assert ModelTeacher(model, name="org/teacher").config_for_card()["name"] == "org/teacher"


def test_the_student_itself_is_refused_as_teacher_before_it_is_frozen():
    student = tiny.model()
    wrapper = nn.Sequential(student)
    for teacher in (student, wrapper):
        with pytest.raises(ValueError, match=r"shares .* parameters with the student"):
            check_not_student(student, teacher)
    assert all(parameter.requires_grad for parameter in student.parameters())
    with pytest.raises(ValueError, match='teacher_model="base"'):
        check_not_student(student, ModelTeacher(student))
    check_not_student(tiny.model(), ModelTeacher(tiny.model()))


def test_a_teacher_with_virtual_tokens_before_the_text_is_refused():
    adapted = get_peft_model(tiny.model("llama"), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"PROMPT_TUNING adapter.*LoRA"):
        ModelTeacher(adapted)


def test_a_teacher_with_a_prefix_says_that_its_attention_cannot_be_heard():
    adapted = get_peft_model(tiny.model("llama"), PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    shape = ModelTeacher(adapted).shape()
    assert shape.no_attention.keys() == {1, 2}
    assert "PREFIX_TUNING" in shape.no_attention[1]


def test_tasks_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"masked_lm model and the teacher .* causal_lm"):
        check_same_task(tiny.model("bert"), ModelTeacher(tiny.model()))
    check_same_task(tiny.model("gpt2"), ModelTeacher(tiny.model()))


@pytest.mark.parametrize(
    ("student", "teacher", "match"),
    [
        ({"num_labels": 2}, {"num_labels": 3}, "2 classes and the teacher 3.*num_labels=3"),
        ({"num_labels": 1}, {"num_labels": 1}, "regression"),
        ({"id2label": {0: "bad", 1: "good"}}, {"id2label": {0: "good", 1: "bad"}}, "same index in both"),
        ({"id2label": {0: "bad", 1: "good"}}, {"id2label": {0: "BAD", 1: "GOOD"}}, None),
        ({"num_labels": 2}, {"id2label": {0: "good", 1: "bad"}}, None),
    ],
)
def test_classes_must_agree_in_number_and_order(student, teacher, match):
    student = tiny.model("bert", task="sequence_classification", **student)
    teacher = ModelTeacher(tiny.model("bert", task="sequence_classification", **teacher))
    if match is None:
        check_same_task(student, teacher)
    else:
        with pytest.raises(ValueError, match=match):
            check_same_task(student, teacher)
