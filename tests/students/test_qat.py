from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_distill.students import convert_qat, load_quantized, prepare_qat, quantize
from tests import tiny
from tests.students.rounding import IDS, logits, naive_twin, student


pytest.importorskip("torchao")
pytest.importorskip("compressed_tensors")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_prepared_student_computes_with_rounded_weights(bits):
    model = student()
    expected = logits(naive_twin(model, f"qat{bits}", 32))
    assert (expected - logits(model)).abs().max() > 1e-3
    assert prepare_qat(model, bits=bits) is model
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)


def test_the_gradient_is_that_of_the_rounded_weights_and_reaches_every_layer():
    twin = naive_twin(student(), "qat4", 32)
    model = prepare_qat(student())
    for each in (model, twin):
        each.train()(input_ids=IDS).logits.logsumexp(-1).sum().backward()
    expected = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        # 8 is no level of 4 bits: the largest weight of a group was clamped to 7, and clamped weights get none.
        reached = parameter.grad != 0
        assert reached.float().mean() > (0.9 if "embed" not in name else 0)
        torch.testing.assert_close(parameter.grad[reached], expected[name].grad[reached], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("bits", "format", "dtype"),
    [
        (4, "compressed-tensors", torch.float32),
        (8, "compressed-tensors", torch.bfloat16),  # as many levels as bf16 has: integers must be found in fp32
        (4, "torchao", torch.bfloat16),
        (8, "torchao", torch.float32),
    ],
)
def test_what_is_written_computes_exactly_what_was_trained(bits, format, dtype, tmp_path):
    student().to(dtype).save_pretrained(tmp_path / "student")
    model = prepare_qat(AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=dtype), bits=bits)
    with torch.no_grad():  # as after training: the scales have moved
        for parameter in model.parameters():
            parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)).to(dtype))
    before = copy.deepcopy(model.state_dict())
    expected = logits(model)
    rows = [{"input_ids": row.tolist()} for row in IDS]
    report = convert_qat(model, tmp_path / "out", format, check=rows, tokenizer=tiny.tokenizer())
    assert report.kl == 0
    assert report.top1_agreement == 1
    assert report.group_size == 32
    assert report.backend == format
    for load in (AutoModelForCausalLM.from_pretrained, load_quantized):
        assert torch.equal(logits(load(tmp_path / "out", dtype=dtype)), expected)
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_packed_weights_take_their_bits_and_a_scale_a_group(tmp_path):
    sizes = {}
    for format in ("compressed-tensors", "torchao"):
        report = convert_qat(prepare_qat(student(), bits=4), tmp_path / format, format)
        sizes[format] = report.bits_per_quantized_weight
    assert 5 <= sizes["compressed-tensors"] < 5.1  # and the shape of each layer
    assert sizes["torchao"] == 8 + 32 / 32 + 8 / 32


def test_the_kl_can_be_to_another_model(tmp_path):
    rows = [{"input_ids": row.tolist()} for row in IDS]
    report = convert_qat(prepare_qat(student()), tmp_path / "out", check=rows, reference=student())
    p, q = (logits(model)[:, :-1].log_softmax(-1) for model in (student(), load_quantized(tmp_path / "out")))
    assert report.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
    assert report.kl > 1e-4


def test_what_is_saved_while_training_is_a_plain_model(tmp_path):
    model = prepare_qat(student())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(student()))
    assert torch.equal(logits(prepare_qat(again)), logits(model))


def quantised():
    model = student()
    model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    return model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: prepare_qat(student(), bits=3), r"`bits` is 3; expected one of \(4, 8\)"),
        (lambda folder: prepare_qat(student(), group_size=48), "multiples of 48"),
        (lambda folder: prepare_qat(quantised()), "quantised already"),
        (lambda folder: prepare_qat(prepare_qat(student())), "prepared already"),
        (lambda folder: convert_qat(student(), folder), "was not prepared.*prepare_qat"),
        (lambda folder: convert_qat(prepare_qat(student()), folder, "gguf"), "`format` is 'gguf'"),
        (lambda folder: quantize(prepare_qat(student()), folder), "convert_qat"),
    ],
)
def test_wrong_calls_are_refused(call, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("hf_distill.students.quantizers.base.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"hf_distill\[torchao\]"):
        prepare_qat(student())
