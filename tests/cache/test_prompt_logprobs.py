from __future__ import annotations

import math

import numpy as np
import pytest

from hf_distill.cache.prompt_logprobs import check_raw, parse_prompt_logprobs
from hf_distill.cache.rows import Row
from hf_distill.cache.top_tokens import TopTokens


def row(*ids: int, kept: list[bool] | None = None) -> Row:
    return Row(np.array(ids, dtype=np.int32), np.array(kept or [True] * (len(ids) - 1)))


def entry(**log_probs: float) -> dict[str, dict]:
    """`_7=-1.5` is the log-probability of token 7; more than is read is there, too."""
    return {name[1:]: {"logprob": value, "rank": 1, "decoded_token": "x"} for name, value in log_probs.items()}


def test_entry_i_plus_1_is_the_distribution_of_position_i() -> None:
    entries = [None, entry(_8=-0.5, _3=-1.5), entry(_9=-0.25, _2=-2.0), entry(_4=-0.75, _1=-3.0)]
    top = parse_prompt_logprobs(entries, row(7, 8, 9, 4, kept=[True, False, True]), k=2)
    assert top.ids.tolist() == [[8, 3], [4, 1]]
    assert top.log_probs.tolist() == [[-0.5, -1.5], [-0.75, -3.0]]
    assert top.labels.tolist() == [8, 4]
    assert top.label_log_probs.tolist() == [-0.5, -0.75]


def test_the_prompts_own_token_is_left_out_where_it_comes_on_top_of_k() -> None:
    """vLLM puts it first, whatever its rank."""
    top = parse_prompt_logprobs([None, entry(_8=-9.0, _3=-0.5, _5=-1.0)], row(7, 8), k=2)
    assert top.ids.tolist() == [[3, 5]]
    assert top.log_probs.tolist() == [[-0.5, -1.0]]
    assert top.label_log_probs.tolist() == [-9.0]
    assert top.has_label.tolist() == [False]


def test_the_prompts_own_token_is_left_out_also_where_its_probability_is_that_of_the_last() -> None:
    top = parse_prompt_logprobs([None, entry(_5=-1.0, _3=-0.5, _8=-1.0)], row(7, 8), k=2)
    assert top.ids.tolist() == [[5, 3]]


def test_what_vllm_clamps_is_impossible() -> None:
    top = parse_prompt_logprobs([None, entry(_8=-9999.0, _3=0.0, _5=-9999.0)], row(7, 8), k=2)
    assert top.log_probs.tolist() == [[0.0, -math.inf]]
    assert top.label_log_probs.tolist() == [-math.inf]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([None, entry(_8=-0.5, _3=-1.5)], "2 tokens for a prompt of 3"),
        ([entry(_8=-0.5, _3=-1.5), entry(_9=-0.5, _3=-1.5), None], "do not hold that token itself, 8"),
        ([None, entry(_8=-0.5, _3=-1.5), None], "do not hold that token itself, 9"),
        ([None, entry(_8=-0.5), entry(_9=-0.5, _3=-1.5)], "have 1 tokens at token 1"),
        ([None, entry(_8=-0.5, _3=-1.5, _4=-1.5, _5=-2), entry(_9=-0.5, _3=-1.5)], "have 4 tokens at token 1"),
    ],
)
def test_an_answer_of_another_shape_is_refused(entries: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_prompt_logprobs(entries, row(7, 8, 9), k=2)


def tokens(log_probs: np.ndarray, label_log_probs: np.ndarray | float = -3.0, label: int = 0) -> TopTokens:
    count, k = log_probs.shape
    return TopTokens(
        np.tile(np.arange(k), (count, 1)),
        log_probs,
        np.full(count, label),
        np.broadcast_to(np.asarray(label_log_probs, dtype=float), (count,)),
    )


def test_log_probabilities_of_the_model_are_taken() -> None:
    check_raw(tokens(np.log([[0.5, 0.3]] * 40)), vocab_size=9)
    check_raw(tokens(np.log([[1 - 1e-7, 1e-7]] * 40)), vocab_size=9)  # a teacher that is sure
    check_raw(tokens(np.log([[0.5, 0.5]] * 31 + [[0.5, 0.4]])), vocab_size=9)  # one token with a rest is enough
    check_raw(tokens(np.log([[0.5, 0.5]] * 40)), vocab_size=2)  # all there is


def test_logits_are_refused() -> None:
    with pytest.raises(ValueError, match="no log-probabilities: those of a token add up to 20"):
        check_raw(tokens(np.array([[-2.0, -3.0], [3.0, -1.0]])), vocab_size=9)
    with pytest.raises(ValueError, match="no log-probabilities"):
        check_raw(tokens(np.array([[math.nan, -3.0]])), vocab_size=9)


def test_log_probabilities_that_leave_nothing_to_the_rest_are_refused() -> None:
    with pytest.raises(ValueError, match="leave no probability to the 7 tokens beyond the 2 most likely ones"):
        check_raw(tokens(np.log([[0.5, 0.5]] * 32)), vocab_size=9)


def test_a_label_beyond_the_tokens_must_find_room() -> None:
    with pytest.raises(ValueError, match=r"add up to 1\.1"):
        check_raw(tokens(np.log([[0.5, 0.5]]), math.log(0.1), label=5), vocab_size=9)
    check_raw(tokens(np.log([[0.5, 0.5]]), math.log(0.5), label=1), vocab_size=9)
