"""`push_distilled` through the real client, over HTTP, to a server on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard, get_session
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from hf_distill import RetentionReport, push_distilled
from hf_distill.cards import DistillationCard
from hf_distill.cli.main import main
from hf_distill.evaluation import RetentionRow
from tests import tiny
from tests.hub import local_hub, talk_to


ROW = RetentionRow("reviews", "accuracy", True, 0.5, 200, 0.9, 0.85, None, 0.875, 0.8, 0.95)
REPORT = RetentionReport((ROW,), 0.8, 0.95)
CARD = DistillationCard(name="student", teacher="org/teacher")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server that the client of this process talks to, at once instead of after pauses."""
    with local_hub() as server:
        talk_to(server.url, monkeypatch)
        yield server


@pytest.fixture
def folder(tmp_path):
    """A student as a trainer leaves it: beside its checkpoints and its logs."""
    path = tmp_path / "student"
    tiny.model("llama").save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    for name in (
        "checkpoint-4/model.safetensors",
        "checkpoint-4/trainer_state.json",
        "runs/events",
        "training_args.bin",
    ):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"not of the model")
    return path


def pull(hub, code, tmp_path):
    """Run code in a process of its own that knows nothing but the server's address."""
    client = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    found = subprocess.run([sys.executable, "-c", code], env=os.environ | client, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_a_model_is_pushed_in_one_commit_and_generates_in_another_process(hub, tmp_path):
    pushed = push_distilled(tiny.model("llama"), "student", REPORT, tiny.tokenizer(), card=CARD)
    assert pushed.repo_id == "user/student"
    assert set(pushed.files) == hub.files["user/student"].keys()
    assert {"model.safetensors", "generation_config.json", "tokenizer.json", "retention.json"} <= set(pushed.files)
    assert sum("/commit/" in request for request in hub.requests) == 1
    code = (
        "from transformers import pipeline; print(pipeline('text-generation', 'user/student')('a', max_new_tokens=2))"
    )
    assert "generated_text" in pull(hub, code, tmp_path)


def test_the_client_reads_the_card_back_and_its_index_is_the_report(hub):
    push_distilled(tiny.model("llama"), "me/student", REPORT, card=CARD)
    card = ModelCard(hub.files["me/student"]["README.md"].decode())
    row = json.loads(hub.files["me/student"]["retention.json"])["rows"][0]
    assert [result.metric_value for result in card.data.eval_results] == [row["student"], row["retention"]]
    assert 'model="me/student"' in card.text
    assert "org/teacher" in card.text


def test_an_adapter_is_pushed_alone_with_a_card_of_ours(hub, tmp_path):
    base = tmp_path / "base"
    tiny.model("llama").save_pretrained(base)
    model = get_peft_model(tiny.model("llama"), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = str(base)
    pushed = push_distilled(model, "me/adapter", folder=tmp_path / "adapter")
    assert "model.safetensors" not in pushed.files
    assert "A PEFT adapter distilled with hf_distill." in hub.files["me/adapter"]["README.md"].decode()
    code = "from peft import AutoPeftModelForCausalLM as A; print(type(A.from_pretrained('me/adapter')).__name__)"
    assert "PeftModelForCausalLM" in pull(hub, code, tmp_path)


def test_a_folder_is_pushed_without_checkpoints_and_logs_and_keeps_its_card(hub, folder):
    (folder / "README.md").write_text("# mine\n")
    assert main(["push", str(folder), "me/student", "--create-pr", "--private"]) == 0
    assert hub.created[0]["visibility"] == "private"
    files = hub.files["me/student"]
    assert not any(name.startswith(("checkpoint", "runs", "training_args")) for name in files)
    assert files["README.md"] == b"# mine\n"
    assert any("create_pr=1" in request for request in hub.requests)


def test_a_branch_is_made_and_pushed_to(hub, folder):
    push_distilled(folder, "me/student", card=CARD, revision="v2")
    assert "POST /api/models/me/student/branch/v2" in hub.requests
    assert any("/commit/v2" in request for request in hub.requests)


@pytest.mark.parametrize(
    ("where", "status", "message"),
    [
        ("/repos/create", 401, "refused the token"),
        ("/commit/", 403, "refused the token"),
        ("/commit/", 500, "answered with status 500"),
        ("/resolve/", 500, "was not finished"),
        ("/repos/create", "silence", r"could not be reached \(ReadTimeout"),
        ("/commit/", "silence", r"could not be reached \(ReadTimeout"),
        ("/preupload/", "reset", r"could not be reached \(RemoteProtocolError"),
        ("/commit/", "reset", r"could not be reached \(RemoteProtocolError"),
    ],
)
def test_a_fault_of_the_network_leaves_the_folder_and_a_second_call_finishes(
    hub, tmp_path, monkeypatch, where, status, message
):
    monkeypatch.setattr("hf_distill.cards.hub.PATIENCE", 0.2)
    hub.faults[where] = [status] * 50
    folder = tmp_path / "student"
    with pytest.raises(ConnectionError, match=message) as error:
        push_distilled(tiny.model("llama"), "me/student", REPORT, tiny.tokenizer(), card=CARD, folder=folder)
    assert f"hf-distill push {folder} me/student" in str(error.value)
    hub.faults.clear()
    monkeypatch.undo()  # of PATIENCE, too: nothing of it may stay with the client
    talk_to(hub.url, monkeypatch)
    assert get_session().timeout.read is None
    assert push_distilled(folder, "me/student").files == tuple(sorted(hub.files["me/student"]))
    assert "org/teacher" in hub.files["me/student"]["README.md"].decode()


def test_a_refused_connection_is_said_in_a_line(folder, monkeypatch, capsys):
    talk_to("http://127.0.0.1:9", monkeypatch)
    assert main(["push", str(folder), "me/student"]) == 2
    assert "could not be reached" in capsys.readouterr().err


def test_a_push_without_a_network_says_that_the_folder_is_complete(folder, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["push", str(folder), "me/student"]) == 2
    assert "is complete: `hf-distill push" in capsys.readouterr().err


def test_a_file_that_arrives_changed_is_noticed(hub, folder, monkeypatch):
    monkeypatch.setattr("tests.hub.base64.b64decode", lambda content: b"other")
    with pytest.raises(ConnectionError, match="is not the one that was pushed"):
        push_distilled(folder, "me/student", card=CARD)


def leave_checkpoints_alone(folder):
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()


def cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def add_a_teacher(folder):
    (folder / "teacher").mkdir()
    tiny.model("llama").save_pretrained(folder / "teacher")


def wrap(folder):
    save_file(
        {
            f"teacher.{name}": value
            for name, value in tiny.model("llama").state_dict().items()
            if name != "lm_head.weight"
        },
        folder / "model.safetensors",
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (leave_checkpoints_alone, r"holds no model.*checkpoint-4"),
        (
            lambda folder: (folder / "checkpoint-4" / "trainer_state.json").unlink(),
            r"holds \['checkpoint-4'\], which were not written to their end",
        ),
        (cut, "cut short or damaged"),
        (add_a_teacher, "weights that are not the model's: .'teacher/model.safetensors'"),
        (wrap, "holds a teacher's weights"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "b.safetensors"}}'
            ),
            "b.safetensors is missing",
        ),
    ],
)
def test_a_folder_that_is_not_one_whole_model_is_refused_before_anything_is_sent(hub, folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        push_distilled(folder, "me/student", card=CARD)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repo_id": "a/b/c"}, "`repo_id` is 'a/b/c'"),
        ({"revision": "v2", "create_pr": True}, "leave one out"),
        ({"tokenizer": tiny.tokenizer()}, "save the tokenizer there"),
        ({"model": "nowhere"}, "which is no folder"),
        ({"model": 3}, "`model` is a int"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_saved(hub, folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        push_distilled(**({"model": folder, "repo_id": "me/student"} | arguments))
    assert hub.requests == []
