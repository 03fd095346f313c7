from __future__ import annotations

import torch

from hf_distill.functional import SparseLogits
from hf_distill.signals import Projection, Targets, TeacherSignals, Tokens, identity


IDS = torch.arange(8).view(2, 4)
LABELS = torch.tensor([[-100, 5, 6, -100], [-100, -100, 7, 8]])


def test_hidden_states_are_compared_where_a_label_follows():
    tokens = Tokens.of(Targets.from_labels(LABELS, shift=True), {"input_ids": IDS}, per_row=False)
    assert tokens.index.tolist() == [0, 1, 5, 6]
    assert tokens.is_first.tolist() == [True, False, False, False]
    assert tokens.sum(torch.tensor([1.0, 2.0, 3.0, 4.0])) == 10


def test_sequences_begin_after_left_padding_and_at_every_packed_document():
    targets = Targets.from_labels(LABELS, shift=True)
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    padded = Tokens.of(targets, {"input_ids": IDS, "attention_mask": mask}, per_row=False)
    assert padded.is_first.tolist() == [False, True, False, False]
    positions = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 2]])
    packed = Tokens.of(targets, {"input_ids": IDS, "position_ids": positions}, per_row=False)
    assert packed.is_first.tolist() == [True, False, True, False]


def test_all_real_tokens_of_a_labelled_row_count_together_as_one_label():
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    batch = {"input_ids": IDS, "attention_mask": mask}
    tokens = Tokens.of(Targets.from_labels(torch.tensor([2, 0]), shift=False), batch, per_row=True)
    assert tokens.index.tolist() == [0, 1, 2, 4, 5, 6, 7]
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 4.0, 4.0, 8.0])
    assert tokens.sum(values) == 2 + 5
    one = Tokens.of(Targets.from_labels(torch.tensor([-100, 0]), shift=False), batch, per_row=True)
    assert one.index.tolist() == [4, 5, 6, 7]


def test_all_real_tokens_of_a_text_count_together_as_much_as_its_labels():
    labels = torch.tensor([[3, 4, 5, -100], [-100, -100, 7, 8], [-100, -100, -100, -100]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]])
    batch = {"input_ids": torch.zeros(3, 4, dtype=torch.int64), "attention_mask": mask}
    tokens = Tokens.of(Targets.from_labels(labels, shift=True), batch, per_row=False, positions="real")
    assert tokens.index.tolist() == [1, 2, 3, 4, 5, 6, 7]  # without padding, and without the text that has no label
    assert tokens.is_first.tolist() == [True, False, False, True, False, False, False]
    torch.testing.assert_close(tokens.weights, torch.tensor([2 / 3] * 3 + [2 / 4] * 4))  # padding predicts 4


def test_packed_texts_count_apart_and_none_goes_on_in_the_next_row():
    labels = torch.tensor([[-100, 5, -100, -100], [6, 7, 8, 9]])
    positions = torch.tensor([[0, 1, 0, 1], [2, 3, 0, 1]])
    batch = {"input_ids": IDS, "position_ids": positions}
    tokens = Tokens.of(Targets.from_labels(labels, shift=True), batch, per_row=False, positions="real")
    assert tokens.index.tolist() == [0, 1, 4, 5, 6, 7]
    torch.testing.assert_close(tokens.weights, torch.tensor([0.5, 0.5, 1.0, 1.0, 0.5, 0.5]))


def test_a_teachers_signals_are_cut_to_the_labels_and_to_what_is_compared():
    hidden = torch.arange(16.0).view(2, 4, 2)
    signals = TeacherSignals(Projection(hidden, identity), {1: hidden})
    targets = Targets.from_labels(LABELS, shift=True)
    kept = {"ends": Tokens(torch.tensor([0, 7]), torch.tensor([True, False]))}
    cut, compared = signals.at(targets, kept)
    assert cut.logits.hidden.tolist() == [[0, 1], [2, 3], [10, 11], [12, 13]]
    assert compared["ends"].hidden[1].tolist() == [[0, 1], [14, 15]]
    assert compared["ends"].logits is cut.logits
    assert cut.hidden == {}


def test_sparse_targets_are_cut_to_the_labels_in_the_order_of_the_flattened_batch():
    targets = Targets.from_labels(LABELS, shift=True)
    row, flat = torch.arange(8.0), LABELS.roll(-1, 1).flatten()
    log_probs = torch.zeros(8, 3)
    sparse = SparseLogits(torch.zeros(8, 3).long(), log_probs, log_probs, {1.0: row}, {1.0: row}, flat, row, 9)
    cut = TeacherSignals(sparse).at(targets)[0].logits
    assert isinstance(cut, SparseLogits)
    assert torch.equal(cut.labels, targets.labels)
    assert cut.label_log_probs.tolist() == cut.entropies[1.0].tolist() == [0, 1, 5, 6]
    assert cut.ids.shape == cut.log_probs.shape == cut.masses.shape == (4, 3)
