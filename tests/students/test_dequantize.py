"""What a quantised folder computes with, as a plain model."""

from __future__ import annotations

import pytest
import torch

from hf_distill.students import load_quantized, quantize
from hf_distill.students.dequantize import dequantize
from hf_distill.students.quantize import check_model
from tests import tiny


SIZES = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.2}
IDS = torch.arange(5, 25).reshape(2, 10)


@pytest.mark.parametrize("method", ["int8", "w8a16", "w4a16"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biases"])
def test_the_plain_model_computes_what_the_quantised_one_does(method, bias, tmp_path):
    student = tiny.model("llama", tie_word_embeddings=True, attention_bias=bias, **SIZES)
    for name, parameter in student.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    quantize(student, tmp_path / "small", method)
    plain = dequantize(tmp_path / "small")
    check_model(plain)
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    with torch.no_grad():
        expected = load_quantized(tmp_path / "small")(input_ids=IDS).logits
        torch.testing.assert_close(plain(input_ids=IDS).logits, expected, rtol=0, atol=1e-4)
    up, rounded = (model.model.layers[0].mlp.up_proj.weight for model in (student, plain))
    assert not torch.equal(up, rounded)


def test_nf4_is_written_out_as_bitsandbytes_does(tmp_path):
    quantize(tiny.model("llama", **SIZES), tmp_path / "small", "nf4")
    plain = dequantize(tmp_path / "small")
    expected = load_quantized(tmp_path / "small").dequantize()
    for name, parameter in plain.named_parameters():
        # Roundings to bf16 apart.
        torch.testing.assert_close(parameter.float(), expected.get_parameter(name).float(), rtol=2**-6, atol=1e-6)


def test_a_folder_that_is_not_quantised_is_refused(tmp_path):
    tiny.model("llama").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"has no quantize_report\.json"):
        dequantize(tmp_path / "plain")
