from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_distill.cache import CacheReader, import_distillkit
from hf_distill.cache.identity import tokenizer_identity
from tests.cache import distillkit_files as files
from tests.cache.distillkit_files import EXACT, PAD, captured, legacy_files, polynomial_files, teacher, texts


QUIET = {"show_progress": False}


class Tokenizer:
    """What of a tokenizer is asked for."""

    pad_token_id, eos_token_id, chat_template = PAD, 1, None

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "b": 1}


@pytest.mark.parametrize(("write", "tolerance"), [(polynomial_files, 0.05), (legacy_files, 0.5)])
def test_a_cache_gives_what_the_files_say(tmp_path: Path, write, tolerance: float) -> None:
    done = import_distillkit(
        write(tmp_path / "kit"),
        tmp_path / "out",
        tokenizer=Tokenizer(),
        teacher="org/teacher",
        shard_tokens=20,
        **QUIET,
    )
    reader, model = CacheReader(tmp_path / "out"), teacher()
    assert len(done.manifest.shards) > 2
    assert [row.ids.tolist() for row in reader.rows()] == texts()
    unknown = 0
    for row in reader.rows():
        expected, targets = captured(row.ids.tolist(), model), reader.targets([row])
        order = targets.log_probs.argsort(1, descending=True)
        assert (targets.log_probs.gather(1, order) - expected.topk(24).values).abs().max() < tolerance
        rest = 1 - expected.topk(24).values.exp().sum(1)
        assert (targets.log_rests[1.0].exp() - rest).abs().max() < 0.05
        labels = torch.from_numpy(row.labels).long()
        known = (targets.ids == labels[:, None]).any(1)
        exact = expected.gather(1, labels[:, None])[:, 0]
        assert ((targets.label_log_probs - exact).abs()[known] < tolerance).all()
        share = (rest / (320 - 24)).log()
        assert ((targets.label_log_probs - share).abs()[~known] < 0.3).all()
        unknown += int((~known).sum())
    assert (done.tokens, done.unknown_labels) == (done.manifest.tokens, unknown)
    assert 0 < unknown < done.tokens
    assert (done.heavy_tokens, done.heaviest < 1) == (0, True)


def test_the_manifest_says_where_it_is_from(tmp_path: Path) -> None:
    kit = polynomial_files(tmp_path / "kit")
    manifest = import_distillkit(kit, tmp_path / "out", tokenizer=Tokenizer(), teacher="org/teacher", **QUIET).manifest
    assert manifest.identity.source == "distillkit"
    assert (manifest.teacher.name, manifest.teacher.vocab_size) == ("org/teacher", 320)
    assert manifest.tokenizer == tokenizer_identity(Tokenizer())
    assert manifest.encoding["k"] == 24


def test_a_pad_token_that_ends_texts_too_is_kept(tmp_path: Path) -> None:
    tokenizer = Tokenizer()
    tokenizer.eos_token_id = PAD
    import_distillkit(polynomial_files(tmp_path / "kit"), tmp_path / "out", tokenizer=tokenizer, **QUIET)
    assert [row.ids.tolist() for row in CacheReader(tmp_path / "out").rows()] == [[*ids, PAD] for ids in texts()]


def heavy_files(folder: Path, excess: float, heavy_rows: int = 1) -> Path:
    """Files in which all tokens of some rows have more than all of the probability."""
    model, rows = teacher(), []
    for number, ids in enumerate(texts()):
        log_probs = captured([*ids, PAD], model)
        if number < heavy_rows:
            log_probs = log_probs - log_probs.topk(24).values.logsumexp(1, keepdim=True) + math.log(excess)
        rows.append(files.polynomial_row([*ids, PAD], log_probs, EXACT))
    return files.write(folder, rows, EXACT)


def test_rounding_above_all_probability_is_counted_and_taken_away(tmp_path: Path) -> None:
    done = import_distillkit(heavy_files(tmp_path / "kit", 1.005), tmp_path / "out", tokenizer=Tokenizer(), **QUIET)
    heavy = len(texts()[0]) - 1
    assert (done.heavy_tokens, done.heaviest) == (heavy, pytest.approx(1.005))
    reader = CacheReader(tmp_path / "out")
    targets = reader.targets([reader.row(0)])
    assert torch.allclose(targets.log_probs.exp().sum(1), torch.ones(heavy), atol=1e-5)


def test_more_than_all_probability_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    kit = heavy_files(tmp_path / "kit", 1.5)
    with pytest.raises(
        ValueError, match=r"Of 59 tokens, 5 have ids that .* the worst to 1\.5\. Either these are logits"
    ):
        import_distillkit(kit, tmp_path / "out", tokenizer=Tokenizer(), **QUIET)
    assert not (tmp_path / "out").exists()
    done = import_distillkit(kit, tmp_path / "out", tokenizer=Tokenizer(), max_mass=math.inf, **QUIET)
    assert (done.heavy_tokens, done.heaviest) == (5, pytest.approx(1.5))


def test_values_that_are_no_numbers_are_refused_at_any_limit(tmp_path: Path) -> None:
    config = EXACT | {"exact_dtype": "float32"}
    row = files.polynomial_row(texts()[0], captured([*texts()[0], PAD], teacher()), config)
    for value in (np.nan, np.inf):
        broken = np.array(row["compressed_logprobs"], dtype=np.uint8)
        broken[0, :4] = np.array([value], dtype=np.float32).view(np.uint8)
        kit = files.write(tmp_path / f"{value}", [row | {"compressed_logprobs": broken.tolist()}], config)
        with pytest.raises(ValueError, match="1 have ids that"):
            import_distillkit(kit, tmp_path / "out", max_mass=math.inf, **QUIET)


def test_ids_beyond_the_vocabulary_or_twice_mean_another_configuration(tmp_path: Path) -> None:
    row = files.polynomial_row(texts()[0], captured([*texts()[0], PAD], teacher()), EXACT)
    for number, ids in enumerate(([*range(23), 320], [*range(23), 22])):
        packed = files.pack_bits(np.array([ids] * len(row["bytepacked_indices"])), 9).tolist()
        kit = files.write(tmp_path / f"{number}", [row | {"bytepacked_indices": packed}], EXACT)
        with pytest.raises(ValueError, match="not below 320, or the same one twice"):
            import_distillkit(kit, tmp_path / "out", **QUIET)


def test_an_import_that_was_done_is_not_done_again(tmp_path: Path) -> None:
    kit = polynomial_files(tmp_path / "kit")
    done = import_distillkit(kit, tmp_path / "out", **QUIET)
    again = import_distillkit(kit, tmp_path / "out", **QUIET)
    assert (again.manifest, again.tokens) == (done.manifest, 0)
