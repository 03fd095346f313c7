from __future__ import annotations

import pytest

from hf_distill.objectives.layer_map import check_mapping, layer_pairs
from hf_distill.signals import ModelShape


def shape(layers: int, name: str = "student", **origin) -> ModelShape:
    return ModelShape(name, layers, 32, **origin)


def pairs(mapping, count: int, student: int, teacher: int):
    return layer_pairs(mapping, count, shape(student), shape(teacher, "teacher"))


def test_uniform_pairs_are_evenly_spaced_and_end_with_the_last_of_both():
    assert pairs("uniform", 4, 32, 80) == ((8, 20), (16, 40), (24, 60), (32, 80))
    assert pairs("uniform", 4, 6, 12) == ((2, 4), (3, 6), (5, 10), (6, 12))


def test_halves_are_rounded_up():
    # 32 layers to 80: 2.5, 5, 7.5, 10 ... as in the catalogue, not to even neighbours.
    teacher = [partner for _, partner in pairs("uniform", 32, 32, 80)]
    assert teacher[:4] == [3, 5, 8, 10]
    assert teacher[-2:] == [78, 80]


def test_there_are_no_more_pairs_than_layers():
    assert pairs("uniform", 4, 2, 6) == ((1, 3), (2, 6))
    assert pairs("last_k", 4, 6, 2) == ((5, 1), (6, 2))


def test_last_k_counts_from_the_end_of_both():
    assert pairs("last_k", 3, 6, 12) == ((4, 10), (5, 11), (6, 12))


def test_every_nth_counts_from_the_last_layer():
    assert pairs("every_nth", 3, 7, 14) == ((1, 2), (4, 8), (7, 14))


def test_inner_layers_follow_each_models_own_depth_and_leave_out_the_last():
    assert pairs("inner", 4, 12, 32) == ((2, 6), (4, 12), (6, 18), (8, 24))
    assert pairs("inner", 4, 3, 32) == ((1, 10), (2, 20))
    assert pairs("inner", 4, 1, 32) == ()


def test_a_student_cut_from_the_teacher_meets_the_layers_it_is_made_of():
    student = shape(4, kept_layers=(0, 1, 2, 5), cut_from=6)
    assert layer_pairs("uniform", 4, student, shape(6, "teacher")) == ((1, 1), (2, 2), (3, 3), (4, 6))
    # Another teacher, of another depth, is met at the same relative depth.
    assert layer_pairs("uniform", 4, student, shape(8, "teacher")) == ((1, 2), (2, 4), (3, 6), (4, 8))


def test_pairs_may_count_from_the_end_and_name_the_embedding():
    assert pairs([(0, 0), (2, -2), (-1, -1)], 4, 6, 12) == ((0, 0), (2, 11), (6, 12))


@pytest.mark.parametrize(("pair", "model"), [((7, 12), "student"), ((6, 13), "teacher"), ((-8, 1), "student")])
def test_a_layer_that_does_not_exist_is_named_with_its_model(pair, model):
    with pytest.raises(ValueError, match=rf"{model}, which has layers 1 to"):
        pairs([pair], 4, 6, 12)


@pytest.mark.parametrize("mapping", ["unifrom", [], [(1, 2, 3)]])
def test_a_mapping_that_is_none_is_refused_before_models_are_known(mapping):
    with pytest.raises(ValueError, match="layer_mapping"):
        check_mapping(mapping, 4)


def test_at_least_one_pair_is_asked_for():
    with pytest.raises(ValueError, match="num_pairs"):
        check_mapping("uniform", 0)
