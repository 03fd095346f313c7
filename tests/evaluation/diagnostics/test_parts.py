"""The parts of a diagnosis against values that are known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from hf_distill import LogitObjective
from hf_distill.evaluation import logged_shares
from hf_distill.evaluation.diagnostics.calibration import expected_calibration_error
from hf_distill.evaluation.diagnostics.gradients import measure_shares
from hf_distill.evaluation.diagnostics.layers import _centred, layer_map
from hf_distill.evaluation.diagnostics.tokenizers import turn_header
from hf_distill.evaluation.rows import tokenize
from hf_distill.functional.features import cka
from hf_distill.vocabularies import disagreement
from tests import tiny


def similarity(a, b):
    index = torch.arange(len(a))
    a, b = (_centred({0: features[None]}, index)[0] for features in (a, b))
    return float(a @ b / (a.norm() * b.norm()))


def test_a_model_that_is_right_as_often_as_it_is_sure_is_calibrated():
    confidence = np.repeat([0.25, 0.75], 400)
    correct = np.tile([1, 0, 0, 0] * 100, 1).tolist() + [1, 1, 1, 0] * 100

    assert expected_calibration_error(confidence, np.array(correct)) == pytest.approx(0.0)
    assert expected_calibration_error(np.ones(10), np.zeros(10)) == 1.0
    assert expected_calibration_error(np.full(10, 0.9), np.array([1] * 7 + [0] * 3)) == pytest.approx(0.2)


def test_cka_is_1_under_rotation_and_scale_and_0_for_unrelated_layers():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 200, generator=generator)
    rotation = torch.linalg.qr(torch.randn(200, 200, generator=generator)).Q
    unrelated = torch.randn(60, 200, generator=generator)

    assert similarity(features, 3 * features @ rotation + 1) == pytest.approx(1.0, abs=1e-5)
    assert abs(similarity(features, unrelated)) < 0.1
    assert 1 - cka(features, unrelated) > 0.7  # the plain estimate has too few tokens


def test_the_dependence_of_unrelated_layers_is_estimated_without_bias():
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(10)
    products = []
    for _ in range(300):
        a, b = (torch.randn(10, 40, generator=generator).exp() for _ in range(2))
        a, b = (_centred({0: features[None]}, index)[0] for features in (a, b))
        products.append(float(a @ b / (a.norm() * b.norm())))

    assert abs(np.mean(products)) < 3 * np.std(products) / len(products) ** 0.5


def test_cka_of_many_tokens_is_that_of_the_plain_estimate():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(1500, 6, generator=generator)
    a, b = (shared @ torch.randn(6, 8, generator=generator) for _ in range(2))
    b = b + torch.randn(1500, 8, generator=generator)

    assert similarity(a, b) == pytest.approx(1 - cka(a, b).item(), abs=0.01)


def test_the_layers_of_a_model_are_most_like_themselves():
    model, other = tiny.model(layers=3, seed=1), tiny.model(layers=2, seed=2)
    rows = tokenize(tiny.tokenized_dataset(24), "causal_lm")

    with torch.no_grad():
        own, cross = (layer_map(model, partner, "causal_lm", rows, 8) for partner in (model, other))

    assert [row[i] for i, row in enumerate(own)] == pytest.approx([1.0] * 4)
    assert (len(cross), len(cross[0])) == (4, 3)
    assert max(max(row) for row in cross) < 1


def test_too_few_tokens_give_no_map():
    rows = tokenize(tiny.tokenized_dataset(1).map(lambda row: {"labels": [-100] * 5 + row["labels"][5:]}), "causal_lm")

    with torch.no_grad():
        assert layer_map(tiny.model(), tiny.model(), "causal_lm", rows[:1], 8) is None


def test_shares_are_those_of_autograd_on_full_logits():
    student, teacher = tiny.model(seed=1), tiny.model(seed=2)
    rows = tokenize(tiny.tokenized_dataset(1), "causal_lm")

    shares = measure_shares(student, teacher, "causal_lm", rows, 8, [LogitObjective(0.3)], 0.7)

    ids, labels = torch.tensor([rows[0]["input_ids"]]), torch.tensor(rows[0]["labels"])[1:]
    kept = labels != -100
    z, t = student(ids).logits[0, :-1][kept], teacher(ids).logits[0, :-1][kept].detach()
    terms = {
        "ce": 0.7 * torch.nn.functional.cross_entropy(z, labels[kept]),
        "forward_kl": 0.3
        * torch.nn.functional.kl_div(z.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="batchmean"),
    }
    norms = {}
    for name, loss in terms.items():
        gradients = torch.autograd.grad(loss, list(student.parameters()), retain_graph=True)
        norms[name] = sum(gradient.square().sum() for gradient in gradients).sqrt().item()
    assert shares == pytest.approx({name: norm / sum(norms.values()) for name, norm in norms.items()}, rel=1e-4)


def test_a_frozen_student_is_measured_as_a_whole_and_stays_frozen():
    rows = tokenize(tiny.tokenized_dataset(4), "causal_lm")
    models = [tiny.model(seed=1), tiny.model(seed=1).requires_grad_(False)]

    free, frozen = (
        measure_shares(model, tiny.model(seed=2), "causal_lm", rows, 2, [LogitObjective(1.0)], 1.0) for model in models
    )

    assert free == frozen
    assert not any(parameter.requires_grad for parameter in models[1].parameters())


def test_the_last_shares_of_a_run_are_read(tmp_path):
    log = [{"ce_gradient_share": 0.1, "forward_kl_gradient_share": 0.9, "step": 1}]
    log += [{"ce_gradient_share": 0.4, "forward_kl_gradient_share": 0.6, "step": 2}, {"loss": 1.0, "step": 3}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    (tmp_path / "other.json").write_text('{"log_history": [{"loss": 1.0}]}')
    (tmp_path / "broken.json").write_text("{")

    assert logged_shares(tmp_path / "trainer_state.json") == {"ce": 0.4, "forward_kl": 0.6}
    with pytest.raises(ValueError, match="GradientShareCallback"):
        logged_shares(tmp_path / "other.json")
    with pytest.raises(ValueError, match="no JSON file"):
        logged_shares(tmp_path / "broken.json")


def test_the_header_of_an_answer_is_what_stands_before_it():
    tokenizer = tiny.tokenizer()
    assert turn_header(tokenizer) == "<|assistant|>"
    tokenizer.chat_template = None
    assert turn_header(tokenizer) is None
    tokenizer.chat_template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    assert turn_header(tokenizer) is None


def test_tokens_that_one_side_alone_has_are_no_disagreement():
    student = {"a": 0, "b": 1, "pad": 2}
    assert disagreement(student, {"a": 0, "b": 1}) == (0, "")
    assert disagreement(student, {"a": 0, "c": 1, "b": 3})[0] == 1
    assert "id 1 is 'b' to the student and 'c' to the teacher" in disagreement(student, {"a": 0, "c": 1, "b": 3})[1]
