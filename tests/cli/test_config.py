"""Every command takes its flags from a YAML file, and those that are given beside it win."""

import pytest

from hf_distill.cli import config
from hf_distill.cli.main import main
from tests.planning.llama import llama_8b


@pytest.fixture
def written(tmp_path):
    def write(text):
        (tmp_path / "run.yaml").write_text(text)
        return str(tmp_path / "run.yaml")

    return write


def test_a_file_stands_for_the_flags_that_are_in_it(written, tmp_path, capsys):
    model = tmp_path / "model"
    llama_8b().save_pretrained(model)
    names = ["--teacher", str(model), "--student", str(model)]
    assert main(["plan", *names, "--gpus", "4", "--gpu-memory", "40", "--length", "1024"]) == 0
    expected = capsys.readouterr().out
    path = written(f"teacher: {model}\nstudent: {model}\ngpus: 4\ngpu_memory: 40\nlength: 512")
    assert main(["plan", "--length", "1024", "--config", path]) == 0
    assert capsys.readouterr().out == expected
    assert main(["plan", "--config", path]) == 0
    assert capsys.readouterr().out != expected


@pytest.mark.parametrize(
    ("arguments", "text", "expected"),
    [
        (["evaluate"], "tasks: [a, b]\nmax-length: 7", ["evaluate", "--tasks", "a", "b", "--max-length", "7"]),
        (["push", "x", "y"], "private: true\ncreate_pr: false", ["push", "x", "y", "--private"]),
        (["plan", "--tok", "3"], "tokens: 1e9\ngpus: null", ["plan", "--tok", "3"]),
        (["plan", "--gpus=3"], "gpus: 8", ["plan", "--gpus=3"]),
    ],
)
def test_lists_switches_and_flags_that_were_given(written, arguments, text, expected):
    assert config.expand([*arguments, "--config", written(text)]) == expected
    assert config.expand([*arguments, f"--config={written(text)}"]) == expected


def test_commands_that_trl_reads_keep_their_file(written):
    arguments = ["train", "--config", written("learning_rate: 1e-4")]
    assert config.expand(arguments) == arguments


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpus: [", "which is no YAML file"),
        ("gpus", "which holds no flags; expected lines like `max_length: 512`"),
        ("3: 4", "which holds no flags"),
    ],
)
def test_a_file_without_flags_is_refused(written, capsys, text, message):
    assert main(["plan", "--config", written(text)]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_not_there_is_named(capsys):
    assert main(["plan", "--config", "nowhere.yaml"]) == 2
    assert "`--config` is 'nowhere.yaml', which is no YAML file" in capsys.readouterr().err


def test_a_flag_of_a_file_that_the_command_does_not_have_is_refused(written, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "--config", written("teacher: a\nstudent: b\nepochs: 3")])
    assert "unrecognized arguments: --epochs 3" in capsys.readouterr().err


def test_the_help_of_every_command_names_the_file(capsys):
    for command in (["plan"], ["evaluate"], ["cache", "build"], ["cache", "verify"], ["push"], ["train"]):
        with pytest.raises(SystemExit, match="0"):
            main([*command, "--help"])
        assert "--config" in capsys.readouterr().out, command
