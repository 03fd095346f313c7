"""The parts of an audit against values that are known."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch

from hf_distill.evaluation.memorization.attacks import MODEL, REFERENCE, score_rows
from hf_distill.evaluation.memorization.blind import blind_scores
from hf_distill.evaluation.memorization.greedy import greedy_matches
from hf_distill.evaluation.memorization.separation import separate, threshold
from hf_distill.evaluation.rows import tokenize
from tests import language, tiny


def test_scores_are_their_formulas_on_full_logits():
    model, reference, tokenizer = tiny.model(seed=1), tiny.model(seed=2), tiny.tokenizer()
    rows = tokenize(tiny.tokenized_dataset(5), "causal_lm")
    texts = [tokenizer.decode([label for label in row["labels"][1:] if label >= 0]) for row in rows]

    with torch.no_grad():
        scores = score_rows({MODEL: model, REFERENCE: reference}, "causal_lm", rows, 2, texts)

    for i, row in enumerate(rows):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        kept = labels != -100
        with torch.no_grad():
            log_q, other = (net(ids).logits[0, :-1][kept].double().log_softmax(-1) for net in (model, reference))
        label = log_q.gather(1, labels[kept][:, None])[:, 0]
        mean = (log_q.exp() * log_q).sum(1)
        deviation = ((log_q.exp() * log_q.square()).sum(1) - mean.square()).sqrt()
        lowest = max(1, len(label) // 5)
        expected = {
            "loss": label.mean(),
            "min_k": label.sort().values[:lowest].mean(),
            "min_k_plus_plus": ((label - mean) / deviation).sort().values[:lowest].mean(),
            "zlib": label.sum() / len(zlib.compress(texts[i].encode())),
            "reference": label.mean() - other.gather(1, labels[kept][:, None]).mean(),
        }
        for name, value in expected.items():
            assert scores[name][i] == pytest.approx(value.item(), rel=1e-3, abs=1e-5), name


def test_a_model_that_gives_no_numbers_is_refused():
    model = tiny.model()
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)

    with torch.no_grad(), pytest.raises(ValueError, match="The model gives labels"):
        score_rows({MODEL: model}, "causal_lm", tokenize(tiny.tokenized_dataset(2), "causal_lm"), 2, None)


def test_the_auc_counts_pairs_and_is_not_flipped():
    members, non_members = np.array([3.0, 1.0, 2.0]), np.array([0.0, 2.0])
    pairs = np.mean([(m > n) + (m == n) / 2 for m in members for n in non_members])

    assert separate("a", members, non_members).auc == pytest.approx(pairs)
    assert separate("a", -members, -non_members).auc == pytest.approx(1 - pairs)
    assert separate("a", np.ones(5), np.ones(4)).auc == 0.5


def test_the_true_positive_rate_is_that_above_the_threshold():
    non_members = np.arange(200.0)
    members = np.array([500.0] * 3 + [198.5] + [197.5] + [197.0] + [0.0] * 4)

    attack = separate("a", members, non_members)

    assert threshold(non_members) == 197.0  # two of 200 are above it
    assert attack.tpr == pytest.approx((members > 197.0).mean())
    assert attack.tpr_low <= attack.tpr <= attack.tpr_high
    assert separate("a", members, non_members[:99]).tpr is None


def test_attacks_on_rows_that_no_model_has_seen_are_a_guess(monkeypatch):
    monkeypatch.setattr("hf_distill.evaluation.memorization.separation.RESAMPLES", 200)
    student = language.train(language.model(32, seed=4), language.sentences(60, seed=7), 60, lr=2e-2)
    rows = tokenize(language.dataset(language.sentences(600, seed=8)), "causal_lm")
    with torch.no_grad():
        scores = score_rows({MODEL: student}, "causal_lm", rows, 100, None)

    covered = []
    for seed in range(15):
        order = np.random.default_rng(seed).permutation(len(rows))
        for name, values in scores.items():
            attack = separate(name, values[order[:100]], values[order[100:200]], seed)
            covered.append(attack.auc_low <= 0.5 <= attack.auc_high)

    assert 0.88 <= np.mean(covered) < 1


def test_the_interval_of_the_auc_covers_the_truth_as_often_as_it_says(monkeypatch):
    monkeypatch.setattr("hf_distill.evaluation.memorization.separation.RESAMPLES", 200)
    generator = np.random.default_rng(0)
    truth = 0.7602  # of two normal distributions one deviation apart
    found = [separate("a", generator.normal(1, 1, 60), generator.normal(0, 1, 60), seed) for seed in range(80)]

    covered = np.mean([attack.auc_low <= truth <= attack.auc_high for attack in found])
    assert 0.88 <= covered <= 0.99


def test_the_blind_baseline_is_a_guess_where_both_sides_are_drawn_alike(monkeypatch):
    monkeypatch.setattr("hf_distill.evaluation.memorization.separation.RESAMPLES", 200)
    found = []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        sides = [[generator.zipf(1.5, 20).clip(max=99).tolist() for _ in range(60)] for _ in range(2)]
        found.append(separate("blind", *blind_scores(*sides, 100, seed), seed))

    assert np.mean([attack.auc for attack in found]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([attack.auc_low <= 0.5 <= attack.auc_high for attack in found]) >= 0.88


@pytest.mark.parametrize("shift", ["tokens", "length"])
def test_the_blind_baseline_sees_a_shift(shift):
    generator = np.random.default_rng(0)
    sides = [[generator.integers(0, 50, 20).tolist() for _ in range(60)] for _ in range(2)]
    sides[1] = [[*row[:-1], 60] if shift == "tokens" else row[:10] for row in sides[1]]

    members, non_members = blind_scores(*sides, 100)

    assert separate("blind", members, non_members).auc > 0.95


def test_a_continuation_is_compared_token_by_token_whatever_the_batch():
    model = tiny.model(seed=1)
    model.generation_config.repetition_penalty = 5.0
    rows = tokenize(tiny.tokenized_dataset(6), "causal_lm")
    with torch.no_grad():
        for row in rows[:4]:  # let the model write the answers of some rows itself
            start = next(i for i, label in enumerate(row["labels"]) if label != -100)
            ids = row["input_ids"][:start]
            for _ in range(10):
                ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
            row["input_ids"], row["labels"] = ids, [-100] * start + ids[start:]
        rows[0]["input_ids"][-1] = rows[0]["labels"][-1] = (rows[0]["labels"][-1] + 1) % 300

        together, alone = greedy_matches(model, rows, 6), greedy_matches(model, rows, 1)

    np.testing.assert_array_equal(together, alone)
    assert together[:4].tolist() == [0.9, 1.0, 1.0, 1.0]
    assert (together[4:][~np.isnan(together[4:])] < 0.5).all()


def test_a_row_without_a_prompt_is_continued_from_its_first_half_and_a_short_one_left_out():
    model = tiny.model(seed=1)
    rows = [{"input_ids": list(range(5, 5 + n)), "labels": list(range(5, 5 + n))} for n in (24, 10)]
    seen = []
    generate = model.generate

    def spy(**kwargs):
        seen.append((kwargs["input_ids"].shape[1], kwargs["generation_config"].max_new_tokens))
        return generate(**kwargs)

    model.generate = spy
    matches = greedy_matches(model, rows, 1)

    assert seen == [(12, 12)]
    assert np.isnan(matches).tolist() == [False, True]
