"""Each planted fault is named, and a healthy pair gets no finding."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_distill import LogitObjective
from hf_distill.evaluation import Diagnosis, diagnose
from hf_distill.objectives import HiddenStateObjective
from hf_distill.teachers import ModelTeacher
from tests import language, tiny


BALANCED = {"objectives": [LogitObjective(0.5)], "ce_weight": 0.5}


@pytest.fixture(scope="module")
def lessons():
    return language.sentences(1000, seed=1)


@pytest.fixture(scope="module")
def held_out():
    return language.dataset(language.sentences(64, seed=2))


@pytest.fixture(scope="module")
def teacher(lessons):
    return language.train(language.model(48, layers=2, seed=1), lessons, 60)


@pytest.fixture(scope="module")
def student(lessons, teacher):
    return language.train(language.model(32, seed=3), lessons, 60, teacher=teacher)


@pytest.fixture(scope="module")
def beginner(lessons):
    return language.train(language.model(32, seed=1), lessons, 15)


@pytest.fixture(scope="module")
def healthy(student, teacher, held_out):
    return diagnose(student, teacher, held_out, **BALANCED)


def names(diagnosis):
    return [finding.name for finding in diagnosis.findings]


def test_a_healthy_pair_gets_no_finding(healthy):
    assert healthy.findings == ()
    assert healthy.healthy
    assert "No failure mode was found." in str(healthy)
    assert "| layer of the student | most alike of the teacher | CKA |" in str(healthy)


def test_a_teacher_is_its_own_healthy_student(teacher, held_out):
    diagnosis = diagnose(teacher, teacher, held_out, **BALANCED)

    assert diagnosis.healthy
    assert diagnosis.measured.information_kept == pytest.approx(1.0)
    assert diagnosis.measured.agreement.value == 1.0
    assert diagnosis.measured.label_correlation == pytest.approx(1.0)


def test_a_student_that_is_too_small_for_its_teacher_is_named(lessons, teacher, held_out):
    small = language.train(language.model(4, seed=3), lessons, 60, teacher=teacher)

    [finding] = diagnose(small, teacher, held_out, **BALANCED).findings

    assert finding.name == "capacity_gap"
    assert finding.evidence["parameters of the teacher"] > 10 * finding.evidence["parameters of the student"]
    assert finding.evidence["information kept"] < 0.9
    assert "taid" in finding.remedy


def test_a_teacher_that_is_worse_than_the_student_is_named(teacher, beginner, held_out):
    [finding] = diagnose(teacher, beginner, held_out).findings

    assert finding.name == "teacher_worse"
    assert 0.05 < finding.evidence["lower end of its 95 % interval"] < finding.evidence["difference"]


def test_a_temperature_that_is_too_high_is_named(student, teacher, held_out):
    hot = diagnose(student, teacher, held_out, objectives=[LogitObjective(0.5, temperature=20.0)], ce_weight=0.5)

    assert names(hot) == ["temperature_too_high"]
    evidence = hot.findings[0].evidence
    assert evidence["on likely tokens"] < evidence["on likely tokens at T = 1"] / 2
    assert evidence["teacher entropy"] > evidence["teacher entropy at T = 1"]


@pytest.mark.parametrize(("kd_weight", "ce_weight", "weak"), [(1e-3, 1.0, "forward_kl"), (1.0, 1e-3, "ce")])
def test_weights_that_are_out_of_balance_are_named(beginner, teacher, held_out, kd_weight, ce_weight, weak):
    [finding] = diagnose(
        beginner, teacher, held_out, objectives=[LogitObjective(kd_weight)], ce_weight=ce_weight
    ).findings

    assert finding.name == "unbalanced_weights"
    assert finding.evidence[f"share of {weak}"] < 0.05
    assert f"raise the weight of {weak}" in finding.remedy


def test_a_term_of_a_run_that_does_not_steer_is_named(beginner, teacher, held_out):
    shares = {"ce": 0.49, "forward_kl": 0.5, "hidden": 0.01}

    diagnosis = diagnose(beginner, teacher, held_out, gradient_shares=shares)

    assert diagnosis.measured.gradient_shares == shares
    assert names(diagnosis) == ["unbalanced_weights"]
    assert diagnosis.findings[0].summary.endswith("hidden does not steer")


def test_a_divergence_that_has_been_minimised_pulls_little_by_right(teacher, held_out):
    shares = {"ce": 0.99, "forward_kl": 0.01}

    assert diagnose(teacher, teacher, held_out, gradient_shares=shares).healthy


def test_a_teacher_that_reads_other_ids_is_named(student, teacher, held_out):
    stranger = language.model(48, layers=2)
    stranger.load_state_dict(teacher.state_dict())
    shuffled = torch.randperm(language.TOKENS, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for weight in (stranger.model.embed_tokens.weight, stranger.lm_head.weight):
            weight.copy_(weight[shuffled])

    [finding] = diagnose(student, stranger, held_out).findings

    assert finding.name == "tokenizer_mismatch"
    assert finding.evidence["teacher NLL"] > finding.evidence["NLL of a uniform guess"]


def test_tokenizers_that_disagree_are_named_before_any_model_runs():
    teacher = tiny.model()
    teacher.forward = None
    other = tiny.tokenizer(vocab_size=280)
    other.add_tokens(["zebra"])

    diagnosis = diagnose(tiny.model(), teacher, tiny.text_dataset(4), tiny.tokenizer(), teacher_tokenizer=other)

    assert names(diagnosis) == ["tokenizer_mismatch"]
    assert "'zebra' to the teacher" in diagnosis.findings[0].evidence["examples"]
    assert diagnosis.measured is None
    assert Diagnosis.from_dict(json.loads(json.dumps(diagnosis.to_dict()))) == diagnosis


def test_chats_in_another_template_than_the_teachers_are_named():
    tokenizer, other = tiny.tokenizer(), tiny.tokenizer()
    other.chat_template = tiny.CHAT_TEMPLATE.replace("<|assistant|>", "<|user|>Answer:")
    chats = [tokenizer.apply_chat_template(row["messages"])["input_ids"] for row in tiny.messages_dataset(6)]
    dataset = Dataset.from_dict({"input_ids": chats})
    teacher = ModelTeacher(tiny.model(seed=1), other)

    [finding] = diagnose(tiny.model(), teacher, dataset, tokenizer).findings

    assert finding.name == "template_mismatch"
    assert finding.evidence["with the student's header"] == finding.evidence["rows"] == 6
    assert finding.evidence["with the teacher's"] == 0
    # The same template, or a text that is no chat, is nothing to complain about.
    assert diagnose(tiny.model(), ModelTeacher(tiny.model(seed=1), tokenizer), dataset, tokenizer).healthy
    assert diagnose(tiny.model(), teacher, tiny.text_dataset(6), tokenizer).healthy


def test_the_means_are_those_of_the_full_logits(student, teacher, held_out, healthy):
    ids = torch.tensor(held_out["input_ids"])
    with torch.no_grad():
        z, t = (model(ids).logits[:, :-1].flatten(0, 1).double() for model in (student, teacher))
    q, p, gold = z.log_softmax(-1), t.log_softmax(-1), ids[:, 1:].flatten()
    nll = -q.gather(1, gold[:, None]).mean()
    kl = (p.exp() * (p - q)).sum(-1).mean()
    mean = p.exp().mean(0)
    context = (p.exp() * (p - mean.log())).sum(-1).mean()
    correlation = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(z, t, strict=True)]).mean()

    measured = healthy.measured
    assert measured.tokens == gold.numel()
    assert measured.student.nll == pytest.approx(nll.item(), rel=1e-5)
    assert measured.student.accuracy == pytest.approx((q.argmax(1) == gold).double().mean().item())
    assert measured.teacher.entropy == pytest.approx(-(p.exp() * p).sum(-1).mean().item(), rel=1e-5)
    assert measured.kl.value == pytest.approx(kl.item(), rel=1e-4)
    assert measured.kl.low < measured.kl.value < measured.kl.high
    assert measured.information_kept == pytest.approx(1 - (kl / context).item(), rel=1e-4)
    assert measured.logit_correlation == pytest.approx(correlation.item(), rel=1e-4)


def test_positions_and_quarters_of_entropy_hold_all_tokens_once(healthy):
    measured = healthy.measured

    assert [part.label for part in measured.by_position] == ["0", "1", "2 to 3", "4 to 7", "8 to 15", "16 to 31"]
    assert [part.tokens for part in measured.by_position] == [64, 64, 128, 256, 512, 448]
    for parts in (measured.by_position, measured.by_teacher_entropy):
        tokens = np.array([part.tokens for part in parts])
        assert (tokens * [part.kl for part in parts]).sum() / tokens.sum() == pytest.approx(measured.kl.value)
    assert measured.by_teacher_entropy[0].teacher_nll < measured.by_teacher_entropy[-1].teacher_nll


def test_only_labelled_tokens_count(student, teacher):
    ids = language.sentences(8, seed=9)
    labels = np.where(np.arange(language.LENGTH) < 10, -100, ids)
    others = labels.copy()
    others[:, 0] = 5  # no position predicts the first token
    masked, first, padded = (
        diagnose(student, teacher, Dataset.from_dict(columns)).measured
        for columns in (
            {"input_ids": ids.tolist(), "labels": labels.tolist()},
            {"input_ids": ids.tolist(), "labels": others.tolist()},
            {
                "input_ids": np.pad(ids, ((0, 0), (0, 3))).tolist(),
                "labels": np.pad(labels, ((0, 0), (0, 3))).tolist(),
                "attention_mask": np.pad(np.ones_like(ids), ((0, 0), (0, 3))).tolist(),
            },
        )
    )

    assert masked == first == padded
    assert masked.tokens == 8 * (language.LENGTH - 10)


def test_a_diagnosis_survives_json_and_holds_plain_numbers(healthy, tmp_path):
    healthy.save(tmp_path / "diagnosis.json")

    assert Diagnosis.load(tmp_path / "diagnosis.json") == healthy
    assert "nan" not in str(healthy).lower()
    assert [item.name for item in tmp_path.iterdir()] == ["diagnosis.json"]


def test_models_are_as_they_were(student, teacher, held_out):
    student.train()
    flags = [parameter.requires_grad_(i % 2 == 0).requires_grad for i, parameter in enumerate(student.parameters())]
    before = torch.get_rng_state()

    diagnose(student, teacher, held_out.select(range(4)), **BALANCED)

    assert student.training
    assert [parameter.requires_grad for parameter in student.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), before)
    student.eval().requires_grad_(True)


def test_classifiers_and_masked_models_are_diagnosed():
    for family, task in (("bert", "sequence_classification"), ("bert", "masked_lm")):
        config = {"num_labels": 3} if task == "sequence_classification" else {}
        models = [tiny.model(family, task=task, seed=seed, **config) for seed in (1, 2)]
        data = tiny.classification_dataset(6) if config else tiny.tokenized_dataset(6)

        diagnosis = diagnose(*models, data, **BALANCED)

        assert diagnosis.measured.rows == 6
        assert set(diagnosis.measured.gradient_shares) == {"ce", "forward_kl"}
        assert len(diagnosis.measured.cka) == 3


def test_a_model_that_gives_no_numbers_is_refused(teacher, held_out):
    broken = language.model(32)
    torch.nn.init.constant_(broken.lm_head.weight, torch.nan)

    with pytest.raises(ValueError, match=r"nll of the student is not finite at 1472 of 1472 tokens"):
        diagnose(broken, teacher, held_out)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"objectives": [HiddenStateObjective(1.0)]}, "logged_shares"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"ce_weight": -1.0}, "`ce_weight` is -1"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_model_runs(given, message):
    teacher = tiny.model()
    teacher.forward = None

    with pytest.raises(ValueError, match=message):
        diagnose(tiny.model(), teacher, tiny.tokenized_dataset(2), **given)
