from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from hf_distill.evaluation.scoring import Lineup, preserved_state, project
from hf_distill.functional import SparseLogits, linear_distillation_loss
from hf_distill.signals import TeacherSignals
from hf_distill.teachers import AdapterDisabledTeacher, ModelTeacher
from tests import tiny


def row_sums(student, teacher, dataset, batch_size=8):
    lineup = Lineup({"student": student, "teacher": teacher})
    with preserved_state(lineup.models.values()):
        return lineup.row_sums(dataset, None, batch_size)


def naive(student, teacher, row, shift):
    """nll, kl, agreement, correct of one row from full logits, without padding."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
    with torch.no_grad():
        ours, theirs = student(input_ids=ids).logits[0].double(), teacher(input_ids=ids).logits[0].double()
    if shift:
        ours, theirs, labels = ours[:-1], theirs[:-1], labels[1:]
    kept = labels != -100
    ours, theirs, labels = ours[kept], theirs[kept], labels[kept]
    nll = -ours.log_softmax(-1).gather(1, labels[:, None]).sum()
    shared = min(ours.shape[1], theirs.shape[1])
    q, p = ours[:, :shared].log_softmax(-1), theirs[:, :shared].log_softmax(-1)
    return {
        "nll": nll.item(),
        "kl": (p.exp() * (p - q)).sum().item(),
        "agreement": (q.argmax(-1) == p.argmax(-1)).sum().item(),
        "correct": (ours.argmax(-1) == labels).sum().item(),
    }


@pytest.mark.parametrize(("family", "shift"), [("llama", True), ("gpt2", True), ("gemma2", True), ("bert", False)])
def test_sums_equal_the_full_logits_computation(family, shift):
    student, teacher = tiny.model(family, seed=1), tiny.model(family, seed=2, layers=3)
    dataset = tiny.tokenized_dataset(5)

    sums = row_sums(student, teacher, dataset)["student"]

    expected = [naive(student, teacher, row, shift) for row in dataset]
    for name, values in sums.sums.items():
        np.testing.assert_allclose(values, [row[name] for row in expected], rtol=1e-4, atol=1e-6, err_msg=name)


def test_vocabularies_padded_to_different_sizes_share_the_kl_and_keep_their_own_likelihood():
    student, teacher = tiny.model(vocab_size=320, seed=1), tiny.model(vocab_size=352, seed=2)
    dataset = tiny.tokenized_dataset(4)

    sums = row_sums(student, teacher, dataset)

    for name in ("nll", "kl", "agreement"):
        expected = [naive(student, teacher, row, True)[name] for row in dataset]
        np.testing.assert_allclose(sums["student"].sums[name], expected, rtol=1e-4)
    own = [naive(teacher, student, row, True)["nll"] for row in dataset]
    np.testing.assert_allclose(sums["teacher"].sums["nll"], own, rtol=1e-5)


def test_sums_are_those_that_training_logs():
    student, teacher = tiny.model(seed=1), tiny.model(seed=2)
    dataset = tiny.tokenized_dataset(1)
    ids, labels = torch.tensor(dataset["input_ids"]), torch.tensor(dataset["labels"])[0, 1:]

    sums = row_sums(student, teacher, dataset)

    with torch.no_grad():
        logged = linear_distillation_loss(
            student.model(ids)[0][0, :-1],
            student.lm_head,
            labels,
            teacher_hidden=teacher.model(ids)[0][0, :-1],
            teacher_head=teacher.lm_head,
            terms={"ce": 1.0},
            metrics=("student_nll", "teacher_nll", "kl", "top1_agreement"),
        )
    measured = {name: values.item() for name, values in sums["student"].sums.items()}
    assert measured["nll"] == pytest.approx(logged.metrics["student_nll"].item(), rel=1e-5)
    assert measured["kl"] == pytest.approx(logged.metrics["kl"].item(), rel=1e-4)
    assert measured["agreement"] == logged.metrics["top1_agreement"].item()
    assert sums["teacher"].sums["nll"].item() == pytest.approx(logged.metrics["teacher_nll"].item(), rel=1e-5)
    assert sums["student"].count.item() == logged.count.item()


def test_tiles_and_batches_do_not_change_the_sums(monkeypatch):
    student, teacher, dataset = tiny.model(seed=1), tiny.model(seed=2), tiny.tokenized_dataset(6)
    whole = row_sums(student, teacher, dataset)

    monkeypatch.setattr("hf_distill.evaluation.scoring.TILE_BYTES", 5 * 4 * 320)
    monkeypatch.setattr("hf_distill.evaluation.scoring.BLOCK_BYTES", 2 * 4 * 320)
    parts = row_sums(student, teacher, dataset, batch_size=1)

    for role in whole:
        np.testing.assert_array_equal(parts[role].count, whole[role].count)
        for name, values in whole[role].sums.items():
            np.testing.assert_allclose(parts[role].sums[name], values, rtol=1e-4, atol=1e-6)


def test_padding_in_the_dataset_is_inert():
    student, teacher, dataset = tiny.model(seed=1), tiny.model(seed=2), tiny.tokenized_dataset(4)

    def pad(row):
        return {
            "input_ids": [9, *row["input_ids"], 9],
            "labels": [9, *row["labels"], 9],
            "attention_mask": [0, *row["attention_mask"], 0],
        }

    plain, padded = row_sums(student, teacher, dataset), row_sums(student, teacher, dataset.map(pad))

    for name, values in plain["student"].sums.items():
        np.testing.assert_array_equal(padded["student"].sums[name], values)


@pytest.mark.parametrize("family", ["distilbert", "llama"])
def test_classifiers_are_scored_as_row_by_row_with_their_own_padding(family):
    task = {"task": "sequence_classification", "num_labels": 3}
    student, teacher = tiny.model(family, seed=1, **task), tiny.model(family, seed=2, pad_token_id=3, **task)
    dataset = tiny.classification_dataset(7)

    sums = row_sums(student, teacher, dataset, batch_size=4)

    with torch.no_grad():
        ours, theirs = (
            torch.cat([model(torch.tensor([row["input_ids"]])).logits for row in dataset]).log_softmax(-1)
            for model in (student, teacher)
        )
    labels = torch.tensor(dataset["labels"])
    np.testing.assert_array_equal(sums["student"].count, 1)
    np.testing.assert_array_equal(sums["student"].sums["correct"], ours.argmax(-1) == labels)
    np.testing.assert_array_equal(sums["teacher"].sums["correct"], theirs.argmax(-1) == labels)
    np.testing.assert_allclose(sums["student"].sums["kl"], (theirs.exp() * (theirs - ours)).sum(-1), atol=1e-6)


def test_a_teacher_object_is_scored_like_its_model():
    student, model, dataset = tiny.model(seed=1), tiny.model(seed=2), tiny.tokenized_dataset(4)

    wrapped, bare = row_sums(student, ModelTeacher(model), dataset), row_sums(student, model, dataset)

    for role in bare:
        for name, values in bare[role].sums.items():
            np.testing.assert_allclose(wrapped[role].sums[name], values, rtol=1e-5, atol=1e-6)


def test_a_student_is_compared_with_its_own_base_without_the_adapter():
    base, dataset = tiny.model(seed=1), tiny.tokenized_dataset(4)
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    student = get_peft_model(tiny.model(seed=1), config)

    sums = row_sums(student, AdapterDisabledTeacher(student), dataset)
    expected = row_sums(student, base, dataset)

    for role in expected:
        for name, values in expected[role].sums.items():
            np.testing.assert_allclose(sums[role].sums[name], values, rtol=1e-5, atol=1e-6)
    assert sums["student"].sums["kl"].min() > 1e-3


def test_everything_is_given_back():
    student, teacher = tiny.model("gpt2", seed=1).train(), tiny.model("gpt2", seed=2)
    student.transformer.drop.eval()
    modes = [module.training for module in student.modules()]
    trainable = [parameter.requires_grad for parameter in student.parameters()]
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()

    with preserved_state([student, teacher]):
        assert not any(module.training for module in student.modules())
        assert not torch.is_grad_enabled()
        torch.rand(3), np.random.rand(3), random.random()
        Lineup({"student": student, "teacher": teacher}).row_sums(tiny.tokenized_dataset(2), None, 8)

    assert [module.training for module in student.modules()] == modes
    assert [parameter.requires_grad for parameter in student.parameters()] == trainable
    assert random.getstate() == states[0]
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    assert torch.is_grad_enabled()
    assert student(torch.tensor([[5, 6]])).logits.shape == (1, 2, 320)


def test_a_model_that_was_moved_is_moved_back():
    model = tiny.model()
    weight = model.lm_head.weight

    class Elsewhere(torch.nn.Module):
        """A model that remembers where it was sent; there is one device here."""

        def __init__(self):
            super().__init__()
            self.place, self.sent = torch.device("cpu"), []

        def parameters(self, recurse=True):
            return iter([torch.empty(1, device=self.place)])

        def to(self, device):
            self.sent.append(device)

    moved = Elsewhere()
    with preserved_state([model, moved]):
        moved.place = torch.device("meta")

    assert moved.sent == [torch.device("cpu")]
    assert model.lm_head.weight is weight


def test_everything_is_given_back_after_an_error():
    student = tiny.model().train()
    state = torch.get_rng_state()

    def interrupted():
        with preserved_state([student]):
            torch.rand(3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert student.training
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_without_a_target_are_not_items():
    dataset = Dataset.from_list([{"input_ids": [5, 6, 7]}, {"input_ids": [5]}])

    sums = row_sums(tiny.model(seed=1), tiny.model(seed=2), dataset)

    assert sums["student"].count.tolist() == [2.0]


@pytest.mark.parametrize("row", [{"input_ids": [5, 6, 7], "labels": [-100] * 3}, {"input_ids": [5]}])
def test_a_dataset_without_a_labelled_token_is_refused(row):
    lineup = Lineup({"student": tiny.model(), "teacher": tiny.model()})

    with pytest.raises(ValueError, match="no labelled token"):
        lineup.rows(Dataset.from_list([row]), None)


def test_labels_outside_the_vocabulary_are_refused_before_any_model_runs():
    lineup = Lineup({"student": tiny.model(), "teacher": tiny.model()})

    with pytest.raises(ValueError, match="labels from 5 to 320, but the student gives logits for 0 to 319"):
        lineup.rows(Dataset.from_list([{"input_ids": [5, 5, 320]}]), None)


def test_models_of_different_tasks_are_refused():
    with pytest.raises(ValueError, match="different tasks"):
        Lineup({"student": tiny.model("llama"), "teacher": tiny.model("bert")})


def test_classifiers_with_different_classes_are_refused():
    task = "sequence_classification"
    models = {
        "student": tiny.model("bert", task=task, num_labels=2),
        "teacher": tiny.model("bert", task=task, num_labels=3),
    }

    with pytest.raises(ValueError, match="'student': 2, 'teacher': 3"):
        Lineup(models).classes()


def test_a_teacher_of_a_few_ids_per_token_is_not_scored():
    class Cached:
        def signals(self, batch, needs):
            values = torch.zeros(batch["input_ids"].numel())
            ids = torch.zeros(len(values), 1, dtype=torch.int64)
            sparse = SparseLogits(ids, values[:, None], None, {1.0: values}, {1.0: values}, ids[:, 0], values, 9)
            return TeacherSignals(sparse)

    with pytest.raises(ValueError, match="Cached gives a few ids per token"):
        project(Cached(), "causal_lm", {"input_ids": torch.zeros(1, 4, dtype=torch.int64)})
