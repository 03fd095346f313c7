"""Cuts in steps: P is made as often as it takes, each cut a stage, with a KD behind it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from hf_distill.anatomy import shape_of
from hf_distill.objectives import HiddenStateObjective
from hf_distill.pipelines import CompressConfig, compress, steps
from hf_distill.pipelines.plan import plan
from hf_distill.students import PruneReport
from tests import tiny


DATA = tiny.tokenized_dataset(32)
NARROW = {"intermediate_size": 96, "round_to": 32}


def planned(folder: str, order: str, steps: int, **settings):
    args = CompressConfig(folder, order=order, steps=steps, prune=NARROW, use_cpu=True, **settings)
    return plan(args, AutoConfig.from_pretrained(folder))


@pytest.mark.parametrize(
    ("order", "steps", "expected"),
    [
        ("P-KD", 1, "P-KD"),
        ("P-KD-Q", 3, "P-KD-P-KD-P-KD-Q"),
        ("P-KD-Q", 0, "P-KD-P-KD-Q"),
        ("KD-P-Q", 2, "KD-P-KD-P-Q"),
        ("KD-Q-P", 2, "KD-Q-P-KD-P"),
    ],
)
def test_between_two_cuts_there_is_a_distillation(order, steps, expected, teacher):
    made = planned(teacher, order, steps)
    assert "-".join(step.kind for step in made) == expected
    sizes = [step.args.spec.intermediate_size for step in made if step.kind == "P"]
    assert sizes == sorted(set(sizes), reverse=True)
    assert sizes[-1] == 96


def test_no_distillation_draws_the_rows_of_another(teacher):
    def seeds(**settings):
        made = planned(teacher, "P-KD", 3, seed=5, **settings)
        return [(step.args.seed, step.args.data_seed) for step in made if step.kind == "KD"]

    assert seeds() == [(5, None), (6, None), (7, None)]
    assert seeds(data_seed=1) == [(5, 1), (6, 2), (7, 3)]


def test_what_is_cut_in_steps_is_counted_in_the_teacher(teacher, config, tmp_path):
    spec = {"intermediate_size": 192, "hidden_size": 32, "drop_layers": [0], "round_to": 16}
    report = compress(teacher, DATA, config(order="P-KD", prune=spec, steps=0, max_steps=2, hidden_weight=1.0))
    cuts = len(report.order.split("-")) // 2
    assert report.order == "-".join(["P-KD"] * cuts)
    assert cuts > 2
    whole, *rows = report.rows
    sizes = [whole.parameters, *(row.parameters for row in rows[::2])]
    assert sizes[1:] == [row.parameters for row in rows[1::2]]
    assert min(after / before for before, after in pairwise(sizes)) >= 2 / 3
    cut = PruneReport.from_dict(rows[-2].facts["prune"])
    assert (cut.parameters_before, cut.parameters_after) == (sizes[0], sizes[-1])
    assert (cut.layers, cut.num_layers_before, cut.hidden_size_before) == ((1, 2), 3, 64)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / report.final)
    assert student.config.hf_distill == json.loads(json.dumps(cut.origin))
    objective = HiddenStateObjective()
    objective.bind(shape_of(student, "student"), shape_of(AutoModelForCausalLM.from_pretrained(teacher), "teacher"))
    assert objective.channels.tolist() == list(cut.channels)
    assert objective.pairs == ((1, 2), (2, 3))
    card = json.loads((tmp_path / "out" / report.final / "card.json").read_text())
    assert card["steps"] == 2 * cuts
    assert f"{sizes[-1] / sizes[0]:.1%} of its parameters" in card["student"]


def test_what_was_scored_is_not_scored_again_after_a_crash(teacher, config, monkeypatch):
    estimate, asked = steps.estimate_importance, []

    def counting(*args, **kwargs):
        asked.append(kwargs["methods"])
        return estimate(*args, **kwargs)

    def no_space(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(steps, "estimate_importance", counting)
    with monkeypatch.context() as patched:
        patched.setattr(steps, "prune", no_space)
        with pytest.raises(OSError, match="no space"):
            compress(teacher, DATA, config(order="P", prune=NARROW))
    compress(teacher, DATA, config(order="P", prune=NARROW))
    assert asked == [{"mlp": "activation"}]


def test_a_quantised_model_is_cut_in_steps_too(teacher, config, tmp_path):
    report = compress(teacher, DATA, config(order="Q-P-KD", prune=NARROW, steps=2, max_steps=1))
    assert report.order == "Q-P-KD-P-KD"
    final = json.loads((tmp_path / "out" / "5-KD" / "config.json").read_text())
    assert (final["intermediate_size"], final["quantization_config"]["quant_method"]) == (96, "torchao")


def test_the_teacher_guides_every_cut_but_that_of_itself(teacher, config, tmp_path):
    settings = {"importance": {"mlp": "taylor"}, "prune": NARROW, "max_steps": 1, "guided": True}
    report = compress(teacher, DATA, config(order="P-KD", steps=2, **settings))
    first, second = (row.facts["prune"]["provenance"]["mlp"] for row in report.rows[1::2])
    assert "taylor of cross-entropy" in first
    assert second.startswith(f"{first}; then taylor of forward KL from the teacher")
    assert planned(teacher, "P-KD", 1, adapt_teacher=1, guided=True)[0].args.guided  # by another one than itself
    for folder, changed, message in [
        ("out", {"guided": False}, r"3-P was made from other settings \(guided by\)"),
        ("new", {"importance": {"mlp": "activation"}}, "`teacher` would be ignored: none of the methods"),
        ("new", {"steps": 1}, "nothing is cut but the teacher itself"),
    ]:
        args = config(order="P-KD", **({"steps": 2} | settings | changed))
        args.output_dir = str(tmp_path / folder)
        with pytest.raises(ValueError, match=message):
            compress(teacher, DATA, args)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": "P-Q", "steps": 2}, r"`steps` is 2, but `order` \(P-Q\) does not have both P and KD"),
        ({"order": "KD-Q", "steps": 0}, "does not have both P and KD"),
        ({"steps": -1}, "`steps` is -1; expected a whole number >= 0"),
        ({"order": "KD-Q-P", "steps": 2, "quantization": "nf4"}, "KD trains with the rounding"),
    ],
)
def test_steps_that_cannot_be_made_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        CompressConfig(str(tmp_path), **settings)


def test_too_few_steps_are_refused_before_weights_are_read(teacher, config):
    (Path(teacher) / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"`steps` is 2; one of them would keep \d+%.*Give more `steps`"):
        compress(teacher, DATA, config(prune=NARROW | {"num_hidden_layers": 1}, steps=2))
