"""A cached teacher gives what the teacher gave, to whatever batches its rows are put into."""

import numpy as np
import pytest
import torch
from transformers import DataCollatorForLanguageModeling
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as PackingCollator

from hf_distill import CachedTeacher, HiddenStateObjective, LogitObjective, ModelTeacher
from hf_distill.cache import build_cache
from hf_distill.functional import SparseLogits, linear_distillation_loss
from hf_distill.functional.head import LMHead
from hf_distill.objectives import AttentionObjective, linear
from hf_distill.signals import Layers, Signal, Targets
from tests import tiny


NEEDS = {Signal.LOGITS}


@pytest.fixture(scope="module")
def data():
    generator = np.random.default_rng(0)
    return [{"input_ids": generator.integers(5, 300, generator.integers(3, 20)).tolist()} for _ in range(12)]


@pytest.fixture(scope="module")
def cache(data, tmp_path_factory):
    built = {}

    def get(encoding, **options):
        key = (encoding, *sorted(options.items()))
        if key not in built:
            built[key] = tmp_path_factory.mktemp(encoding) / "cache"
            build_cache(
                tiny.model("llama"),
                data,
                built[key],
                encoding=encoding,
                tokenizer=tiny.tokenizer(),
                shard_tokens=40,
                show_progress=False,
                **options,
            )
        return CachedTeacher(built[key])

    return get


def padded(rows, side="right"):
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = side
    return dict(DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows))


def padded_left(rows):
    batch = padded(rows, "left")
    first = batch["attention_mask"].argmax(1, keepdim=True)
    batch["labels"].scatter_(1, first, -100)
    return batch


def packed(rows):
    return dict(PackingCollator(pad_token_id=0, padding_free=True, pad_to_multiple_of=8)([dict(row) for row in rows]))


BATCHES = {"right": padded, "left": padded_left, "padding-free": packed}


def log_probs(signals, index):
    output = signals.logits.at(index)
    return output.head(output.hidden).float().log_softmax(-1)


@pytest.mark.parametrize("encoding", ["dense", "hidden"])
@pytest.mark.parametrize("batching", BATCHES)
def test_whole_distributions_are_those_of_the_teacher_in_every_batch(cache, data, encoding, batching):
    options = {"dtype": "float32"} if encoding == "hidden" else {}
    batch = BATCHES[batching]([data[7], data[2], data[10]])
    index = Targets.from_labels(batch["labels"], shift=True).index
    assert len(index) == sum(len(data[row]["input_ids"]) - 1 for row in (7, 2, 10))
    live = ModelTeacher(tiny.model("llama")).signals(batch, NEEDS)
    stored = cache(encoding, **options).signals(batch, NEEDS)
    torch.testing.assert_close(log_probs(stored, index), log_probs(live, index), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("batching", BATCHES)
def test_a_student_that_is_the_teacher_is_as_far_from_it_as_the_steps_of_the_quantisation(
    cache, data, temperature, batching
):
    batch = BATCHES[batching](data[:5])
    targets = Targets.from_labels(batch["labels"], shift=True)
    live = ModelTeacher(tiny.model("llama")).signals(batch, NEEDS).logits.at(targets.index)
    stored = cache("topk", k=40, temperatures=(1.0, 2.0)).signals(batch, NEEDS).logits.at(targets.index)
    assert isinstance(stored, SparseLogits)
    assert torch.equal(stored.labels, targets.labels)
    out = linear_distillation_loss(
        live.hidden,
        LMHead(live.head.weight),
        targets.labels,
        teacher_targets=stored,
        terms={"forward_kl": 1.0},
        temperature=temperature,
        metrics=("teacher_nll", "top1_agreement", "kl"),
    )
    assert abs(out.metrics["kl"] / out.count) < 2e-3
    assert abs(out.parts["forward_kl"] / out.count / temperature**2) < 2e-3
    assert out.metrics["top1_agreement"] / out.count > 0.95  # of a random model, whose first two are near each other


def test_prompts_are_not_read_and_labels_that_were_not_kept_are_refused(data, tmp_path):
    half = [{**row, "labels": [-100] * 2 + row["input_ids"][2:]} for row in data]
    build_cache(tiny.model("llama"), half, tmp_path, encoding="topk", k=4, show_progress=False)
    teacher = CachedTeacher(tmp_path)
    batch = padded([data[1]])
    with pytest.raises(ValueError, match=r"not what the teacher says after its token 0: only positions with a label"):
        teacher.signals(batch, NEEDS)
    batch["labels"][0, :2] = -100
    targets = Targets.from_labels(batch["labels"], shift=True)
    assert torch.equal(teacher.signals(batch, NEEDS).logits.at(targets.index).labels, targets.labels)


def test_a_batch_without_labels_reads_nothing(cache, data):
    batch = padded(data[:2])
    batch["labels"][:] = -100
    signals = cache("topk", k=40, temperatures=(1.0, 2.0)).signals(batch, NEEDS)
    assert len(signals.logits.at(torch.empty(0, dtype=torch.int64))) == 0


def test_a_batch_that_has_no_labels_at_all_is_refused(cache, data):
    batch = padded(data[:2])
    del batch["labels"]
    with pytest.raises(ValueError, match=r"no `labels`.*evaluate_retention"):
        cache("dense").signals(batch, NEEDS)


@pytest.mark.parametrize("cut", [slice(1, None), slice(None, -1)])
def test_a_row_that_is_not_there_is_refused_with_its_first_tokens_and_what_to_check(cache, data, cut):
    row = {"input_ids": data[3]["input_ids"][cut]}
    first = ", ".join(map(str, row["input_ids"][:3]))
    with pytest.raises(ValueError, match=rf"has no row \[{first}.*`max_length` and the packing"):
        cache("dense").signals(padded([row]), NEEDS)


def test_a_label_after_padding_is_refused(cache, data):
    with pytest.raises(ValueError, match="A label follows padding"):
        cache("dense").signals(padded(data[:3], "left"), NEEDS)


def test_a_label_that_belongs_to_the_next_document_is_refused(cache, data):
    batch = packed(data[:2])
    batch["labels"] = batch["input_ids"].clone()
    with pytest.raises(ValueError, match="A label follows the last token of a sequence"):
        cache("dense").signals(batch, NEEDS)


@pytest.mark.parametrize(
    ("encoding", "objective", "message"),
    [
        ("topk", LogitObjective(divergence="taid"), "'taid' looks at every probability"),
        ("topk", LogitObjective(temperature=3.0), r"declares \[1\.0, 2\.0\]"),
        ("topk", LogitObjective(temperature=linear(1.0, 2.0)), "from 1 to 2 in small steps"),
        ("sampled", LogitObjective(divergence="reverse_kl"), "sampled masses only"),
        ("topk", HiddenStateObjective(), "encoding='hidden'"),
        ("hidden", HiddenStateObjective(positions="real"), "compares all real tokens"),
        ("hidden", AttentionObjective(), "provides only"),
    ],
)
def test_what_a_cache_cannot_give_is_refused_before_the_first_step(cache, encoding, objective, message):
    options = {"k": 40, "temperatures": (1.0, 2.0)} if encoding == "topk" else {}
    options |= {"dtype": "float32"} if encoding == "hidden" else {}
    with pytest.raises(ValueError, match=message):
        cache(encoding, **options).check_objectives([objective])


def test_hidden_states_of_the_last_layer_are_there_and_others_are_refused(cache, data):
    teacher = cache("hidden", dtype="float32")
    live = ModelTeacher(tiny.model("llama"))
    assert (teacher.shape().num_layers, teacher.shape().hidden_size) == (2, live.shape().hidden_size)
    batch, last = padded(data[:3]), Layers(hidden=frozenset({2}))
    index = Targets.from_labels(batch["labels"], shift=True).index
    stored, given = (
        one.signals(batch, {Signal.HIDDEN_STATES}, last).hidden[2].flatten(0, -2)[index] for one in (teacher, live)
    )
    torch.testing.assert_close(stored, given, rtol=1e-5, atol=1e-5)
    teacher.check_layers(last)
    with pytest.raises(ValueError, match=r"layers \[1\].*the last one, 2"):
        teacher.check_layers(Layers(hidden=frozenset({1, 2})))


def test_another_vocabulary_is_refused_an_added_pad_token_is_not_and_another_template_is_said(cache):
    teacher, tokenizer = cache("dense"), tiny.tokenizer()
    teacher.check_vocabulary(tokenizer, 300)
    with pytest.raises(ValueError, match="another tokenizer than the student's"):
        teacher.check_vocabulary(tiny.tokenizer(extra_tokens=("<new>",)), 300)
    tokenizer.chat_template = "{{ messages }}"
    with pytest.warns(UserWarning, match="chat template is not the one"):
        teacher.check_vocabulary(tokenizer, 300)


def test_the_card_says_that_the_soft_labels_came_from_a_cache(cache):
    facts = cache("topk", k=40, temperatures=(1.0, 2.0)).config_for_card()
    assert facts["architecture"] == "LlamaForCausalLM"
    assert "topk, T = 1, 2" in facts["soft_labels"]
