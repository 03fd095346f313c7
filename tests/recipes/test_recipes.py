"""Recipes run as a user starts them: the rehearsals, and the offline ones on tiny stand-ins for what they fetch."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from tests import tiny


RECIPES = Path(__file__).parents[2] / "recipes"
REVIEW = "{}\t{}\t{}\n"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a recipe in a folder of its own, with its neighbours importable as for a script."""

    def start(name: str, *flags: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *flags])
        monkeypatch.syspath_prepend(str(RECIPES))
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(RECIPES / name), run_name="__main__")

    return start


@pytest.fixture
def small_assets(monkeypatch, tmp_path):
    """A cache that holds tiny stand-ins for the fetched model and text."""
    cache = tmp_path / "cache"
    tokenizer = tiny.tokenizer()
    for name, model in [
        ("smollm2-135m-instruct", tiny.model("llama", layers=6)),
        ("all-minilm-l6-v2", tiny.model("bert", layers=6, task="sequence_classification", num_labels=2)),
    ]:
        model.save_pretrained(cache / name)
        tokenizer.save_pretrained(cache / name)
    (cache / "reviews").mkdir()
    for name in ("movieReviewSnippets", "amazonReviewSnippets", "nytEditorialSnippets"):
        lines = [REVIEW.format(i, (-1) ** i * 2.0, f"{tiny.SENTENCES[i % 5]} {name} {i}") for i in range(60)]
        (cache / "reviews" / f"{name}_GroundTruth.txt").write_text("".join(lines))
    monkeypatch.setenv("HF_DISTILL_CACHE", str(cache))


@pytest.mark.parametrize("flags", [[], ["--lora"]], ids=["full", "lora"])
def test_the_quickstart_ends_with_a_table_a_student_and_a_true_card(flags, run, small_assets, tmp_path, capsys):
    run("quickstart.py", "--steps", "2", *flags)
    table = capsys.readouterr().out
    for name in ("teacher", "student", "before distillation", "cross-entropy only"):
        assert f"│ {name} " in table  # of sizes and speeds
    assert "95 % interval" in table
    folder = tmp_path / "outputs" / "quickstart"
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "| before distillation | cross-entropy only |" in card.text
    assert f'make quickstart ARGS="--steps 2{" --lora" * bool(flags)}"' in card.text
    assert "| training time (minutes) |" in card.text
    assert str(tmp_path) not in (folder / "README.md").read_text()
    student = AutoModelForCausalLM.from_pretrained(folder)
    assert student.config.num_hidden_layers == 4
    run("generate.py", str(folder))
    assert "The film was" in capsys.readouterr().out


def test_the_classifier_recipe_reports_accuracy_of_both_students(run, small_assets, tmp_path, capsys):
    run("classify_reviews.py", "--steps", "2")
    assert capsys.readouterr().out.count(": accuracy ") == 2
    card = ModelCard.load(tmp_path / "outputs" / "classify_reviews" / "README.md")
    assert card.data.pipeline_tag == "text-classification"


@pytest.mark.parametrize("recipe", ["lora_student.py", "llama_70b_to_8b.py"])
def test_a_rehearsal_runs_the_whole_recipe(recipe, run, tmp_path, capsys):
    run(recipe, "--rehearse", "--output_dir", "student")
    output = capsys.readouterr().out
    assert "perplexity" in output
    if recipe == "llama_70b_to_8b.py":
        assert "70.55" in output
        assert "Memory per rank" in output
    assert ModelCard.load(tmp_path / "student" / "README.md").data.tags


@pytest.mark.parametrize(
    "flags",
    [["--adapt_teacher", "2"], pytest.param(["--orders", "all"], marks=pytest.mark.slow)],
    ids=["losses", "orders"],
)
def test_the_compression_ends_with_a_table_of_every_stage(flags, run, small_assets, tmp_path, capsys):
    run("compress_smollm2.py", "--steps", "2", "--output_dir", str(tmp_path / "out"), *flags)
    table = capsys.readouterr().out
    models = ["before", "pruned", "pruned + CE", "pruned + KD", "pruned + CE + KD + int8", "adapted teacher"]
    for row in models if "--orders" not in flags else ["P-KD-Q", "Q-KD-P", "KD-P-Q"]:
        assert f"| {row} " in table
    card = ModelCard.load(next((tmp_path / "out").glob("*-0/3-*")) / "README.md")
    assert "| 1-" in card.text
