"""Every method on the real model that the recipes use."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from hf_distill.evaluation import KLDivergence, Perplexity, evaluate_retention
from hf_distill.students import load_quantized, quantize
from recipes import assets
from tests.students.rounding import each_method


# Most that the bits of a quantised weight, the KL in nats and the perplexity over the student's may be.
LIMITS = {
    "int8": (8.1, 0.03, 1.03),
    "w8a16": (8.1, 0.03, 1.03),
    "w4a16": (4.3, 1.0, 1.6),
    "nf4": (4.2, 0.6, 1.5),
    "int8-bnb": (8.1, 0.1, 1.1),
    "gguf-q8_0": (8.5, 0.03, 1.03),
    "gguf-q4_0": (4.5, 0.7, 1.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", each_method())
def test_smollm2_keeps_what_the_bits_allow(method, tmp_path):
    student = assets.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(student)
    texts = [review.text for review in assets.review_texts()["test"]]
    rows = assets.pack(texts, tokenizer, 128).select(range(8))
    report = quantize(student, tmp_path / "out", method, check=rows)
    bits, kl, ratio = LIMITS[method]
    assert report.bits_per_quantized_weight <= bits
    assert 0 < report.kl < kl
    assert report.weight_bytes < report.weight_bytes_before * (0.45 if bits < 5 else 0.62)
    again = load_quantized(tmp_path / "out", dtype=torch.bfloat16)
    reference = type(again).from_pretrained(student, dtype=torch.bfloat16)
    measured = evaluate_retention(again, reference, [Perplexity(rows), KLDivergence(rows)])
    perplexity, divergence = measured.rows
    assert perplexity.student < ratio * perplexity.teacher
    assert divergence.student == pytest.approx(report.kl, rel=0.05)
    arguments = {"gguf_file": report.gguf_file} if report.gguf_file else {}
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out", **arguments)(texts[:200]).input_ids
    assert tokens == tokenizer(texts[:200]).input_ids
