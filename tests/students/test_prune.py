from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from hf_distill.anatomy import shape_of
from hf_distill.objectives import HiddenStateObjective
from hf_distill.students import ImportanceScores, PruneReport, PruneSpec, prune, shrink
from hf_distill.teachers import load_teacher
from tests import tiny
from tests.students.twins import DOWN, GATED, IDS, build, logits, masked_logits


SPECS = {
    "depth": {"drop_layers": (1,)},
    "mlp": {"intermediate_size": 40},
    "heads": {"num_attention_heads": 2},
    "groups": {"num_key_value_heads": 1},
    "hidden": {"hidden_size": 24},
    "all": {"num_hidden_layers": 2, "intermediate_size": 40, "num_key_value_heads": 1, "hidden_size": 16},
}
NARROW = {"depth": SPECS["depth"], "mlp": SPECS["mlp"], "both": SPECS["depth"] | SPECS["mlp"]}
OPERATIONS = [(family, name, spec) for family in GATED for name, spec in SPECS.items()]
OPERATIONS += [(family, name, spec) for family in DOWN for name, spec in NARROW.items()]


def random_scores(model, layers: int = 4) -> ImportanceScores:
    generator = torch.Generator().manual_seed(2)
    heads = model.config.num_attention_heads
    return ImportanceScores(
        mlp=torch.rand(layers, 64, generator=generator),
        heads=torch.rand(layers, heads, generator=generator),
        hidden=torch.rand(32, generator=generator),
        layers=torch.rand(layers, generator=generator),
        provenance={"mlp": "at random"},
    )


def cut(model, **spec):
    return prune(model, PruneSpec(**({"round_to": 8} | spec)), random_scores(model))


@pytest.mark.parametrize(("family", "name", "spec"), OPERATIONS, ids=[f"{row[0]}-{row[1]}" for row in OPERATIONS])
def test_the_cut_model_is_the_masked_one_and_a_plain_one(family, name, spec, tmp_path):
    model = build(family)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = copy.deepcopy(model.config.to_dict())
    student, report = cut(model, **spec)
    found, expected = logits(student), masked_logits(model, family, report)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (expected - logits(model)).abs().max() > 1e-2  # the mask matters
    assert type(student) is type(model)
    assert not student.training
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert report.parameters_after == sum(p.numel() for p in student.parameters()) < report.parameters_before

    student.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).hf_distill == report.origin
    again = type(model).from_pretrained(tmp_path).eval()
    assert (logits(again) - found).abs().max() == 0.0
    if family != "bert":
        settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
        cached = student.generate(IDS, use_cache=True, **settings)
        assert torch.equal(cached, student.generate(IDS, use_cache=False, **settings))


@pytest.mark.parametrize("family", ["llama", "smollm3", "gemma2", "gemma3", "phi3"])
@pytest.mark.parametrize("tied", [True, False])
def test_heads_stay_tied_or_apart_and_compute_the_same_after_reload(family, tied, tmp_path):
    model = build(family, tie_word_embeddings=tied)
    student, report = cut(model, hidden_size=16)
    torch.testing.assert_close(logits(student), masked_logits(model, family, report), atol=1e-5, rtol=0)
    student.save_pretrained(tmp_path)
    for made in (student, type(model).from_pretrained(tmp_path)):
        assert (made.get_output_embeddings().weight is made.get_input_embeddings().weight) == tied
    size = (tmp_path / "model.safetensors").stat().st_size
    assert report.bytes_after < size < report.bytes_after + 10_000  # the rest is the header
    assert report.bytes_after == 4 * report.parameters_after


@pytest.mark.parametrize(
    ("family", "spec"), [("llama", SPECS["all"]), ("gpt2", NARROW["both"]), ("bert", SPECS["mlp"])]
)
def test_classifiers_keep_their_head(family, spec):
    model = build(family, task="sequence_classification", num_labels=3)
    student, report = cut(model, **spec)
    torch.testing.assert_close(logits(student), masked_logits(model, family, report), atol=1e-5, rtol=0)


def test_what_scores_highest_stays():
    model = build("llama", layers=3)
    scores = ImportanceScores(
        mlp=torch.arange(64.0).repeat(3, 1),
        heads=torch.tensor([[1.0, 9, 4, 3], [1, 2, 4, 3], [0, 0, 7, 1]]),
        hidden=-torch.arange(32.0),
        layers=torch.tensor([1.0, 3, 2]),
        provenance={name: f"how {name}" for name in ("mlp", "heads", "hidden", "layers")},
    )
    spec = PruneSpec(num_hidden_layers=2, intermediate_size=8, num_attention_heads=2, hidden_size=16, round_to=8)
    _, report = prune(model, spec, scores)
    assert report.layers == (1, 2)
    assert report.layer_map == {0: 1, 1: 2}
    assert report.neurons == (tuple(range(56, 64)),) * 2
    assert report.heads == ((1, 2), (0, 2))  # the best of each group
    assert report.kv_heads == ((0, 1), (0, 1))
    assert report.channels == tuple(range(16))
    assert report.channel_map == {i: i for i in range(16)}
    assert report.provenance == scores.provenance
    _, report = prune(model, PruneSpec(num_key_value_heads=1), scores)
    assert report.heads == ((0, 1), (2, 3), (2, 3))  # whole groups
    assert report.kv_heads == ((0,), (1,), (1,))
    assert report.provenance == {"heads": "how heads"}
    _, report = prune(model, PruneSpec(num_key_value_heads=1, num_attention_heads=1), scores)
    assert report.heads == ((1,), (2,), (2,))  # the best head of the group whose best head scores highest
    assert report.kv_heads == ((0,), (1,), (1,))


def test_without_scores_weight_norms_and_positions_decide_and_say_so():
    model = build("phi3")
    with torch.no_grad():
        model.model.layers[0].mlp.gate_up_proj.weight[64 + 5] *= 100
        model.model.layers[2].self_attn.qkv_proj.weight[8:16] *= 100
        model.model.embed_tokens.weight[:, 7] *= 100
    spec = PruneSpec(num_hidden_layers=3, intermediate_size=8, num_attention_heads=2, hidden_size=16, round_to=8)
    with pytest.warns(UserWarning, match="weight norms and the position of layers"):
        _, report = prune(model, spec)
    assert report.layers == (0, 2, 3)
    assert 5 in report.neurons[0]
    assert 1 in report.heads[1]
    assert 7 in report.channels
    norm = "norm of the weights, without data"
    assert report.provenance == {
        "mlp": norm,
        "heads": norm,
        "hidden": norm,
        "layers": "position: evenly spaced, without data",
    }


def test_the_report_survives_json(tmp_path):
    _, report = cut(build("qwen3"), **SPECS["all"])
    report.save(tmp_path / "report.json")
    assert PruneReport.load(tmp_path / "report.json") == report
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert report.params_ratio == report.parameters_after / report.parameters_before


def test_reports_of_two_cuts_add_up_to_that_of_the_masked_first_model():
    model = build("llama")
    between, first = cut(model, drop_layers=(0,), intermediate_size=56, hidden_size=24)
    scores = ImportanceScores(
        mlp=torch.rand(3, 56), heads=torch.rand(3, 4), hidden=torch.rand(24), layers=torch.rand(3)
    )
    student, second = prune(
        between, PruneSpec(num_hidden_layers=2, intermediate_size=24, num_attention_heads=2, round_to=8), scores
    )
    both = second.after(first)
    torch.testing.assert_close(logits(student), masked_logits(model, "llama", both), atol=1e-5, rtol=0)
    assert both.origin["teacher_num_hidden_layers"] == 4
    assert both.channels == first.channels
    assert (both.parameters_before, both.parameters_after) == (first.parameters_before, second.parameters_after)
    assert both.provenance["mlp"] == "at random; then scores given"
    with pytest.raises(ValueError, match="two cuts in their order"):
        first.after(second)


def test_hidden_state_objectives_compare_what_was_kept():
    teacher = build("llama")
    student, report = cut(teacher, num_hidden_layers=2, hidden_size=16)
    shapes = shape_of(student, "student"), shape_of(teacher, "teacher")
    objective = HiddenStateObjective(num_pairs=2)
    objective.bind(*shapes)
    assert objective.pairs == ((1, report.layers[0] + 1), (2, 4))
    assert objective.channels.tolist() == list(report.channels)
    assert not list(objective.projectors.parameters())
    other = HiddenStateObjective()
    other.bind(shapes[0], shape_of(tiny.model("llama", hidden_size=48), "teacher"))  # cut from another width
    assert other.channels is None
    assert len(other.projectors) == 2


def test_cutting_nothing_but_depth_is_what_shrink_does():
    model = build("gemma3")
    student, _ = prune(model, PruneSpec(num_hidden_layers=2), ImportanceScores())
    shrunk = shrink(model, num_hidden_layers=2)
    assert student.config.to_dict() == shrunk.config.to_dict()
    assert all(torch.equal(tensor, shrunk.state_dict()[name]) for name, tensor in student.state_dict().items())


def test_dtype_device_generation_config_and_random_state_are_left():
    model = build("gemma2").to(torch.bfloat16)
    model.generation_config.max_new_tokens = 3
    state = torch.get_rng_state()
    student, report = cut(model, **SPECS["all"])
    assert torch.equal(torch.get_rng_state(), state)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert student.generation_config.max_new_tokens == 3
    assert report.bytes_after == 2 * report.parameters_after


def test_models_that_cannot_be_cut_are_refused_with_the_way_out(tmp_path):
    spec = PruneSpec(num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"'distilbert' cannot be pruned; known are bert, gemma2, .*shrink"):
        prune(tiny.model("distilbert"), spec)
    adapted = get_peft_model(tiny.model("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge_and_unload"):
        prune(adapted, spec)
    with pytest.raises(ValueError, match=r"offloaded or sharded. Call `prune`"):
        prune(tiny.model("llama").to("meta"), spec)
    tiny.model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"without quantisation .*call `prune`"):
        prune(load_teacher(tmp_path, quantization="nf4").model, spec)
    changed = tiny.model("llama")
    changed.model.layers[0].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"mlp.extra.weight, which is unknown in the family 'llama'"):
        prune(changed, PruneSpec(hidden_size=16, round_to=8))
    with pytest.raises(ValueError, match=r"mlp.extra.in_features"):
        cut(changed, hidden_size=16)


@pytest.mark.parametrize("spec", [{"intermediate_size": 60}, {"num_hidden_layers": 2}, {"drop_layers": ()}])
def test_a_spec_that_is_rounded_to_what_is_there_is_refused(spec):
    with pytest.raises(ValueError, match=r"cuts nothing: the model has 2 layers, 64 neurons.*smaller `round_to`"):
        prune(tiny.model("llama"), PruneSpec(**spec))


def test_scores_of_another_model_or_without_what_is_cut_are_refused():
    model = build("llama")
    scores = random_scores(model, layers=3)
    with pytest.raises(ValueError, match=r"shape \[3, 64\], but this model needs \[L, I\] = \[4, 64\]"):
        prune(model, PruneSpec(intermediate_size=8, round_to=8), scores)
    with pytest.raises(ValueError, match=r"`scores.heads` is needed for"):
        prune(model, PruneSpec(num_attention_heads=2), ImportanceScores())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_real_model_is_cut_as_it_is_masked(tmp_path):
    from recipes import assets

    model = AutoModelForCausalLM.from_pretrained(assets.smollm2(), dtype=torch.float32).eval()
    with pytest.warns(UserWarning, match="no scores"):
        student, report = prune(model, PruneSpec(num_attention_heads=6, hidden_size=384, params_ratio=0.5))
    assert report.params_ratio == pytest.approx(0.5, abs=0.01)
    expected, found = masked_logits(model, "llama", report), logits(student)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), found)
