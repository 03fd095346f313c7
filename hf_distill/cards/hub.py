"""A distilled model on the Hub: files, card and evidence in one commit, loaded back to see that they arrived."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from hf_distill.cards.data import DistillationCard, installed_versions
from hf_distill.cards.folder import CONFIGS, check_folder, files_of
from hf_distill.cards.render import draw_plots, write_card
from hf_distill.evaluation import RetentionReport


REPORT_FILE = "retention.json"
# Stands in the card that PEFT writes by itself, beside every adapter that it saves.
PEFT_CARD = "[More Information Needed]"
# Failed requests, refused connections and timeouts have in common the base class of huggingface_hub's HTTP client.
NETWORK_ERROR = HfHubHTTPError.__mro__[1]
# Seconds that the Hub may be silent: its client would wait for ever. Large commits take it a minute or two.
PATIENCE = 300.0


@dataclass(frozen=True)
class Pushed:
    """What `push_distilled` put on the Hub.

    Args:
        repo_id: The repository.
        commit: Hash of the commit.
        url: Of the commit, or of the pull request.
        files: Paths that were uploaded.
    """

    repo_id: str
    commit: str
    url: str
    files: tuple[str, ...]


def push_distilled(
    model: Any,
    repo_id: str,
    report: RetentionReport | None = None,
    tokenizer: Any = None,
    *,
    card: DistillationCard | None = None,
    folder: str | Path | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Push a distilled model",
    token: str | bool | None = None,
) -> Pushed:
    """Push a student or an adapter with its tokenizer, card and retention report, in one commit.

    All files are written here first, and stay where `folder` is given; every file is downloaded again afterwards and
    compared. After a fault of the network the same call goes on.

    Args:
        model: A model, a PEFT model, or the folder of a saved one.
        repo_id: `name` or `organisation/name`.
        report: Retention against the teacher, also written as `retention.json`.
        tokenizer: Saved beside the model.
        card: What the card says. Without one a `README.md` of the folder stays, and a model gets one that says what
            its config and the report do.
        folder: Where a model is saved; a temporary folder if None.
        private: Whether a new repository is.
        revision: A branch, which is created where it is missing; the main one if None.
        create_pr: Open a pull request instead of committing.
        commit_message: Of the commit.
        token: Of the Hub; the one that is logged in if None.

    Raises:
        ValueError: An argument is wrong, or the folder holds no whole model, or another one's weights.
        ConnectionError: The Hub could not be reached, refused, or said nothing for five minutes; the folder is
            complete.

    Example:
        ```python
        push_distilled(trainer.model, "me/student", report, tokenizer, card=DistillationCard(name=..., teacher=...))
        ```
    """
    _check_arguments(model, repo_id, tokenizer, folder, revision, create_pr)
    api = HfApi(token=token)
    with _saved(model, tokenizer, folder) as path:
        check_folder(path)
        _document(path, repo_id, report, card)
        try:
            commit = _upload(api, repo_id, path, revision, create_pr, private, commit_message)
            _check_arrived(api, commit, path)
        except (NETWORK_ERROR, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            stays = folder is not None or isinstance(model, (str, Path))
            raise ConnectionError(_remedy(error, repo_id, path, stays=stays)) from error
        return Pushed(commit.repo_url.repo_id, commit.oid, commit.pr_url or commit.commit_url, tuple(files_of(path)))


def _document(folder: Path, repo_id: str, report: RetentionReport | None, card: DistillationCard | None) -> None:
    """Write report and card beside the model; a card that somebody wrote there stays unless another is given."""
    if report is not None:
        report.save(folder / REPORT_FILE)
    own = folder / "README.md"
    if card is None and (not own.exists() or PEFT_CARD in own.read_text(encoding="utf-8")):
        config = json.loads(next(path for name in CONFIGS if (path := folder / name).exists()).read_text())
        card = DistillationCard(
            name=repo_id.split("/")[-1],
            adapter="peft_type" in config,
            base_model=config.get("base_model_name_or_path"),
            versions=installed_versions(),
        )
    if card is not None:
        report = report or card.report
        plots = draw_plots(report, folder) or card.plots
        write_card(replace(card, repo_id=repo_id, report=report, plots=plots), folder)


def _check_arguments(
    model: Any, repo_id: str, tokenizer: Any, folder: str | Path | None, revision: str | None, create_pr: bool
) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`repo_id` is {repo_id!r}; expected `name` or `organisation/name`: {error}") from None
    if revision is not None and create_pr:
        raise ValueError(
            f"`revision` is {revision!r} and `create_pr` is True: a pull request has a revision of its own; leave one "
            "out."
        )
    if isinstance(model, (str, Path)):
        if not Path(model).is_dir():
            raise ValueError(
                f"`model` is {str(model)!r}, which is no folder; give a model or the folder of a saved one."
            )
        if folder is not None or tokenizer is not None:
            raise ValueError(
                "`model` is a folder, and `folder` or `tokenizer` is given; save the tokenizer there, and leave them "
                "out."
            )
    elif not hasattr(model, "save_pretrained"):
        raise ValueError(f"`model` is a {type(model).__name__}; expected a Hugging Face or PEFT model, or a folder.")


@contextmanager
def _saved(model: Any, tokenizer: Any, folder: str | Path | None) -> Iterator[Path]:
    """The folder that is pushed."""
    if isinstance(model, (str, Path)):
        yield Path(model)
        return
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(folder or temporary)
        model.save_pretrained(path)
        if tokenizer is not None:
            tokenizer.save_pretrained(path)
        yield path


def _upload(
    api: HfApi, repo_id: str, folder: Path, revision: str | None, create_pr: bool, private: bool | None, message: str
) -> CommitInfo:
    with _patience():
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        with _patience():
            api.create_branch(name, branch=revision, exist_ok=True)
    operations = [CommitOperationAdd(path, folder / path) for path in files_of(folder)]
    with _patience():
        return api.create_commit(name, operations, commit_message=message, revision=revision, create_pr=create_pr)


@contextmanager
def _patience() -> Iterator[None]:
    """Let a request that is not answered fail, which the Hub's client does for downloads alone."""
    client = get_session()
    before = client.timeout
    client.timeout = PATIENCE
    try:
        yield
    finally:
        client.timeout = before


def _check_arrived(api: HfApi, commit: CommitInfo, folder: Path) -> None:
    """Download every file of the commit and compare it with the one here.

    Raises:
        ConnectionError: One differs.
    """
    with tempfile.TemporaryDirectory() as temporary:
        for path in files_of(folder):
            arrived = api.hf_hub_download(commit.repo_url.repo_id, path, revision=commit.oid, cache_dir=temporary)
            if _digest(Path(arrived)) != _digest(folder / path):
                raise ConnectionError(f"{path} on the Hub is not the one that was pushed; push again.")
            Path(arrived).resolve().unlink()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remedy(error: Exception, repo_id: str, folder: Path, *, stays: bool) -> str:
    """What went wrong, and how to go on."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        why = f"the Hub refused the token (status {status}): run `hf auth login`, or give `token=` one that may write"
    elif status is not None:
        why = f"the Hub answered with status {status}"
    else:
        why = f"the Hub could not be reached ({type(error).__name__}: {error})"
    rest = (
        f"The folder {folder} is complete: `hf-distill push {folder} {repo_id}` goes on."
        if stays
        else ("Push again; with `folder=` what was saved stays.")
    )
    return f"The push of {repo_id} was not finished: {why}. {rest}"
