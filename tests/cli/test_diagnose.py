"""`hf-distill diagnose`: findings, exit status, and the file."""

import json

import pytest

from hf_distill.cli.main import main
from hf_distill.evaluation import Diagnosis
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    for name, seed in (("student", 0), ("teacher", 1)):
        tiny.model("llama", seed=seed).save_pretrained(path / name)
        tiny.tokenizer().save_pretrained(path / name)
    stranger = tiny.tokenizer(vocab_size=280)
    stranger.add_tokens(["zebra"])
    tiny.model("llama").save_pretrained(path / "stranger")
    stranger.save_pretrained(path / "stranger")
    tiny.text_dataset(12).to_json(path / "texts.jsonl")
    tiny.messages_dataset(6).to_json(path / "chats.jsonl")
    return path


def arguments(folder, teacher="teacher", dataset="texts.jsonl"):
    given = {"student": "student", "teacher": teacher, "dataset": dataset}
    return ["diagnose", *(part for name, value in given.items() for part in (f"--{name}", str(folder / value)))]


def test_a_pair_without_findings_ends_in_0_and_the_file_is_what_was_printed(folder, tmp_path, capsys):
    out = tmp_path / "diagnosis.json"
    recipe = ["--kd-weight", "0.5", "--ce-weight", "0.5"]
    assert main([*arguments(folder, "student"), *recipe, "--json", str(out)]) == 0
    diagnosis = Diagnosis.load(out)
    assert str(diagnosis) in capsys.readouterr().out
    assert diagnosis.measured.rows == 12
    assert set(diagnosis.measured.gradient_shares) == {"ce", "forward_kl"}


def test_a_finding_ends_in_1(folder, capsys):
    assert main(arguments(folder, "stranger")) == 1
    assert "**tokenizer_mismatch**" in capsys.readouterr().out


def test_shares_are_taken_from_a_run(folder, tmp_path, capsys):
    state = tmp_path / "trainer_state.json"
    state.write_text(json.dumps({"log_history": [{"ce_gradient_share": 0.999, "hidden_gradient_share": 0.001}]}))
    assert main([*arguments(folder), "--trainer-state", str(state)]) == 1
    assert "hidden does not steer" in capsys.readouterr().out


def test_chats_are_read_as_the_trainer_reads_them(folder, tmp_path):
    out = tmp_path / "diagnosis.json"
    call = [*arguments(folder, dataset="chats.jsonl"), "--rows", "4", "--json", str(out)]
    main([*call, "--assistant-only-loss"])
    answers = Diagnosis.load(out).measured
    main(call)
    assert answers.rows == 4
    assert answers.tokens < Diagnosis.load(out).measured.tokens


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--temperature", "2"], "give its `--kd-weight`"),
        (["--kd-weight", "1", "--divergence", "forward"], "Unknown divergence 'forward'"),
        (["--trainer-state", "none.json"], "none.json"),
        (["--rows", "0"], "`--rows` is 0"),
        (["--assistant-only-loss"], "is of chats"),
    ],
)
def test_a_wrong_argument_ends_in_2_and_a_line(folder, given, message, capsys):
    assert main([*arguments(folder), *given]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("hf-distill: ")
