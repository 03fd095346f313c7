"""Advice on a teacher that is far larger than its student."""

from __future__ import annotations

from hf_distill.planning import gap_note


B = 10**9


def test_up_to_ten_times_there_is_nothing_to_say():
    assert gap_note(10 * B, B) is None


def test_a_size_is_proposed_with_its_source_and_flags():
    note = gap_note(70 * B, B)
    for expected in ("70.0 times", "2.50 B parameters", "2311.07052", "`--divergence taid`", "2501.16937"):
        assert expected in note
    assert "soft labels" not in note
    assert "needs the teacher itself" in gap_note(70 * B, B, teacher_cached=True)


def test_the_candidate_nearest_to_the_best_size_is_named():
    sizes = {"small": B // 2, "near": 3 * B, "far": 8 * B, "huge": 100 * B}
    note = gap_note(70 * B, B, candidates=sizes)
    assert "the teacher into near (3.00 B, 3.0 times the student)" in note
    assert "none of the candidates" in gap_note(70 * B, B, candidates={"huge": 100 * B})
