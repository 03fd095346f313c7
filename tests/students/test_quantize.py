from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from hf_distill.students import QuantizeReport, load_quantized, quantize
from tests import tiny
from tests.processes import exit_code
from tests.students.rounding import IDS, PACKAGES, each_method, logits, naive_twin, needs, student


# Distance of logits to those of weights rounded by hand: of kernels that round what they multiply, too.
TOLERANCES = {"nf4": 0.15, "int8-bnb": 0.1}
ROWS = [
    {"input_ids": IDS[0].tolist(), "labels": [-100] * 5 + IDS[0, 5:].tolist()},
    {
        "input_ids": [0, 0, *IDS[1].tolist()],
        "attention_mask": [0, 0] + [1] * 12,
        "labels": [-100] * 5 + IDS[1, 3:].tolist(),
    },
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Quantise the student by a method, once."""
    done = {}

    def write(method: str) -> tuple[Path, QuantizeReport]:
        if method not in done:
            folder = tmp_path_factory.mktemp("quantised") / method
            done[method] = folder, quantize(student(), folder, method, tokenizer=tiny.tokenizer(), check=ROWS)
        return done[method]

    return write


def plain_load(folder: Path) -> torch.nn.Module:
    files = [file.name for file in folder.glob("*.gguf")]
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, gguf_file=files[0] if files else None)


@pytest.mark.parametrize("method", each_method())
def test_from_pretrained_gives_the_weights_rounded_by_hand(method, written):
    folder, report = written(method)
    expected, original = logits(naive_twin(student(), method, report.group_size)), logits(student())
    found = logits(plain_load(folder))
    error = (expected - original).abs().max()
    tolerance = TOLERANCES.get(method, 1e-4)
    assert error > 5 * min(tolerance, 1e-3)  # the rounding shows
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(logits(load_quantized(folder, dtype=torch.float32)), found, rtol=0, atol=0)
    assert (
        AutoTokenizer.from_pretrained(folder)("Two plus two").input_ids == tiny.tokenizer()("Two plus two").input_ids
    )


def reload_and_compare(folders: list[tuple[str, str]]) -> None:
    for folder, expected in folders:
        assert torch.equal(logits(plain_load(Path(folder))), torch.load(expected)), folder


@pytest.mark.parametrize("methods", [each_method()], ids=["all"])
def test_a_new_process_loads_the_same(methods, written, tmp_path):
    folders = []
    for method in (parameter.values[0] for parameter in methods if not parameter.marks[0].args[0]):
        folder, _ = written(method)
        torch.save(logits(plain_load(folder)), tmp_path / method)
        folders.append((str(folder), str(tmp_path / method)))
    assert exit_code(reload_and_compare, folders) == 0


def tensors_of(folder: Path) -> dict[str, tuple[str, int]]:
    """Kind and bytes of every tensor, by name."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            found |= {name: (str(t.dtype), t.numel() * t.element_size()) for name, t in tensors.items()}
    for file in folder.glob("*.gguf"):
        from gguf import GGUFReader

        found |= {t.name: (t.tensor_type.name, t.data.nbytes) for t in GGUFReader(file).tensors}
    return found


@pytest.mark.parametrize("method", each_method())
def test_bytes_and_bits_are_those_of_the_tensors_in_the_files(method, written):
    folder, report = written(method)
    tensors = tensors_of(folder)
    layers = {name: size for name, (_, size) in tensors.items() if "_proj" in name or "ffn" in name or "attn" in name}
    layers = {name: size for name, size in layers.items() if "norm" not in name}
    embeddings = {name: kind for name, (kind, _) in tensors.items() if "embd" in name or "output.w" in name[:8]}
    weights = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128)
    total = weights + 2 * 320 * 64 + 5 * 64
    bits = 8 * sum(layers.values())
    if method == "gguf-q8_0":
        weights += 2 * 320 * 64
        bits += 8 * sum(tensors[name][1] for name in embeddings)
        assert report.left == {}
    else:
        kept = "Q8_0" if method == "gguf-q4_0" else "F32"
        assert report.left == {"model.embed_tokens": kept, "lm_head": kept}
    assert report.quantized_parameters == weights
    assert report.parameters == total
    assert report.bits_per_quantized_weight == pytest.approx(bits / weights)
    assert report.bits_per_weight == pytest.approx(8 * sum(size for _, size in tensors.values()) / total)
    files = [file for kind in ("*.safetensors", "*.gguf") for file in folder.glob(kind)]
    assert report.weight_bytes == sum(os.path.getsize(file) for file in files)
    assert 4 * total < report.weight_bytes_before < 4 * total + 5000  # fp32 and a header
    assert report.gguf_file == (files[0].name if method.startswith("gguf") else None)


@pytest.mark.parametrize("method", each_method())
def test_the_kl_is_that_of_the_reloaded_model_over_the_labelled_tokens(method, written):
    folder, report = written(method)
    ours, theirs = plain_load(folder), student()
    kl, agree = [], []
    for ids, first in ((IDS[:1], 5), (IDS[1:], 3)):
        p, q = (logits(model, ids)[0, first - 1 : -1].log_softmax(-1) for model in (theirs, ours))
        kl.append((p.exp() * (p - q)).sum(-1))
        agree.append((p.argmax(-1) == q.argmax(-1)).float())
    assert report.tokens == len(torch.cat(kl)) == 7 + 9
    assert report.kl == pytest.approx(torch.cat(kl).mean().item(), rel=1e-2, abs=1e-7)
    assert report.top1_agreement == pytest.approx(torch.cat(agree).mean().item())
    assert 0 < report.kl < 0.1


@pytest.mark.parametrize("method", each_method("int8", "nf4"))
def test_the_report_is_read_back_from_the_folder(method, written):
    folder, report = written(method)
    assert QuantizeReport.load(folder) == report
    assert QuantizeReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert f"{method} by {report.backend} {report.backend_version}" in str(report)
    with pytest.raises(ValueError, match="expected"):
        QuantizeReport.from_dict(report.to_dict() | {"more": 1})
    with pytest.raises(ValueError, match=r"no quantize_report\.json"):
        QuantizeReport.load(folder.parent)


@pytest.mark.parametrize("method", each_method("int8", "w4a16", "nf4", "gguf-q4_0"))
def test_a_folder_gives_the_bytes_of_the_model_in_memory_whether_or_not_it_is_checked(method, written, tmp_path):
    # The check runs what was written: 4-bit weights that were saved after a pass in eval mode would differ.
    folder, checked = written(method)
    student().save_pretrained(tmp_path / "student")
    tiny.tokenizer().save_pretrained(tmp_path / "student")
    report = quantize(tmp_path / "student", tmp_path / "again", method)
    assert report.kl is None
    assert report.weight_bytes == checked.weight_bytes
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]:
        assert tensors_of(folder) == tensors_of(tmp_path / "again")
        assert torch.equal(logits(plain_load(folder)), logits(plain_load(tmp_path / "again"))), file


@needs("torchao")
def test_the_student_and_the_random_state_are_left_as_they_were(tmp_path):
    model = student().train()
    model.model.layers[0].eval()
    before = copy.deepcopy(model.state_dict())
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    quantize(model, tmp_path / "out", check=ROWS)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(model.config, "quantization_config")


@needs("torchao")
@pytest.mark.parametrize("family", ["gemma3", "phi3", "smollm3", "gpt_neox"])
def test_other_families_are_rounded_too(family, tmp_path):
    model = student(family, **({"head_dim": 16} if family == "gemma3" else {}))
    report = quantize(model, tmp_path / "out")
    torch.testing.assert_close(
        logits(load_quantized(tmp_path / "out", dtype=torch.float32)), logits(naive_twin(model, "int8"))
    )
    assert 8 < report.bits_per_quantized_weight < 9.1
    tied = model.config.tie_word_embeddings
    assert len(report.left) == (1 if tied else 2)  # the embedding, and the head where it is another


@needs("torchao")
def test_biases_are_not_counted_with_the_quantised_weights(tmp_path):
    report = quantize(student("qwen2", layers=1), tmp_path / "out")
    widths = [64, 32, 32, 64, 128, 128, 64]  # outputs of the seven layers, each with a scale and a zero point
    weights = 64 * (64 + 32 + 32 + 64 + 128 + 128) + 128 * 64
    assert report.quantized_parameters == weights
    assert report.bits_per_quantized_weight == pytest.approx(8 + 8 * 5 * sum(widths) / weights)


@needs("torchao")
def test_stacked_experts_are_said_to_be_left(tmp_path):
    report = quantize(tiny.model("mixtral", layers=1), tmp_path / "out")
    assert report.left["model.layers.0.mlp.experts.gate_up_proj"] == "float32"


@needs("torchao")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_nothing(error, tmp_path, monkeypatch):
    def stop(*_):
        raise error("in the middle")

    monkeypatch.setattr(QuantizeReport, "save", stop)
    with pytest.raises(error, match="in the middle"):
        quantize(student(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def lora_student():
    return get_peft_model(student(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))


def quantised_student():
    model = student()
    model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    return model


@needs("torchao")
@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (quantised_student, {}, r"quantised already \(int8\)"),
        (lora_student, {}, "merge_and_unload"),
        (student, {"method": "int3"}, "expected one of 'int8'"),
        (student, {"method": "int4"}, "no CPU kernel.*method='w4a16'"),
        (student, {"method": "gguf-q4_k_m"}, "llama-quantize"),
        (student, {"group_size": 0}, "`group_size` is 0; expected 32, 64 or 128"),
        (student, {"method": "nf4", "group_size": 32}, "blocks of its own"),
        (student, {"group_size": 48}, "multiples of 48, but 'model.layers.0.self_attn.q_proj'"),
        (lambda: tiny.model("gpt2"), {}, "no nn.Linear"),
        (student, {"check": [{"text": "hello"}]}, "tokenize it first"),
        (student, {"check": [{"input_ids": [400, 5]}]}, "vocabulary ends at 319"),
        (student, {"check": [{"input_ids": [5]}]}, "no labelled token"),
        (lambda: tiny.model("llama", task="sequence_classification"), {"check": ROWS}, "classifier"),
        (lambda: "nowhere", {}, "config.json and safetensors"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(model, arguments, message, tmp_path, monkeypatch):
    from hf_distill.students.quantizers.torchao_format import TorchAOQuantizer

    monkeypatch.setattr(TorchAOQuantizer, "write", lambda *_: pytest.fail("it went on"))
    with pytest.raises(ValueError, match=message):
        quantize(model(), tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("method", "widths", "message"),
    [
        *((m, {"hidden_size": 72}, "multiples of 64") for m in ["nf4"]),
        *((m, {"intermediate_size": 80}, "multiples of 32") for m in ["w4a16", "gguf-q8_0"]),
        ("w8a16", {"intermediate_size": 66}, "multiples of 4"),
    ],
)
def test_widths_that_a_format_cannot_hold_are_refused_by_layer(method, widths, message, tmp_path):
    pytest.importorskip(PACKAGES[method])
    with pytest.raises(ValueError, match=rf"{message}.*'model\.layers\.0\.") as caught:
        quantize(tiny.model(**({"hidden_size": 64} | widths)), tmp_path / "out", method, tokenizer=tiny.tokenizer())
    assert "64 when you prune" in str(caught.value)


def test_a_folder_that_is_quantised_or_holds_an_adapter_is_refused(written, tmp_path):
    pytest.importorskip("compressed_tensors")
    folder, _ = written("w4a16")
    with pytest.raises(ValueError, match="quantised already"):
        quantize(folder, tmp_path / "out", "w8a16")
    lora_student().save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="merge_and_unload"):
        quantize(tmp_path / "adapter", tmp_path / "out", "w8a16")
    with pytest.raises(ValueError, match="which exists"):
        quantize(student(), folder, "w8a16")


@pytest.mark.parametrize("method", PACKAGES)
def test_a_missing_package_is_named_with_the_line_that_installs_it(method, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_distill.students.quantizers.base.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"which is not installed: `pip install \"hf_distill\["):
        quantize(student(), tmp_path / "out", method)
