from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from hf_distill.evaluation import ExactMatch, GenerationBenchmark, Rouge, evaluate_retention
from hf_distill.evaluation.generation import generate
from hf_distill.teachers import AdapterDisabledTeacher, ModelTeacher, Teacher
from tests import tiny


PROMPTS = ["The quick brown", "A student learns from a teacher that", "Two", "Short one. And then"]


def dataset(completions=("a", "b", "c", "d")) -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS, "completion": list(completions)})


def one_by_one(model, tokenizer, prompt: str, tokens: int) -> str:
    """Greedy decoding without padding, cache or `generate`."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    start = ids.shape[1]
    for _ in range(tokens):
        with torch.no_grad():
            following = model(ids).logits[0, -1].argmax()
        if following == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, following.view(1, 1)], 1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generations_in_padded_batches_are_those_of_each_prompt_alone(family):
    model, tokenizer = tiny.model(family, seed=1, initializer_range=0.3), tiny.tokenizer()

    together = generate(model, [tokenizer(prompt)["input_ids"] for prompt in PROMPTS], tokenizer, 8)

    assert together == [one_by_one(model, tokenizer, prompt, 8) for prompt in PROMPTS]
    assert len(set(together)) > 1


def test_the_models_own_generation_settings_are_not_used_and_stay():
    model, tokenizer = tiny.model(seed=1, initializer_range=0.3), tiny.tokenizer()
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    plain = generate(model, prompts, tokenizer, 8)
    own = model.generation_config
    own.do_sample, own.temperature, own.repetition_penalty, own.max_length = True, 5.0, 3.0, 9

    assert generate(model, prompts, tokenizer, 8) == plain
    assert model.generation_config is own
    assert (own.do_sample, own.repetition_penalty) == (True, 3.0)


def test_a_model_keeps_all_of_what_it_writes_itself():
    teacher, tokenizer = tiny.model(seed=1, initializer_range=0.3), tiny.tokenizer()
    written = [one_by_one(teacher, tokenizer, prompt, 6) for prompt in PROMPTS]
    rows = dataset([f" {written[0]}\n", *written[1:3], "something else"])
    benchmarks = [ExactMatch(rows, max_new_tokens=6), Rouge(rows, "rouge1", max_new_tokens=6)]

    report = evaluate_retention(teacher, teacher, benchmarks, tokenizer)

    match, overlap = report.rows
    assert (match.teacher, match.student, match.retention) == (0.75, 0.75, 1.0)
    assert (match.metric, overlap.metric, match.n) == ("exact_match", "rouge1", 4)
    assert (report.mean_retention, report.mean_ci_low, report.mean_ci_high) == (1.0, 1.0, 1.0)


def test_a_generation_is_cut_before_the_first_of_the_texts():
    benchmark = ExactMatch(dataset(), until=["\n", "Q:"])

    assert [benchmark._cut(text) for text in ("4\nand", "4 Q: why\n", "four")] == ["4", "4 ", "four"]


def test_everything_is_given_back():
    student, teacher, tokenizer = tiny.model(seed=1).train(), tiny.model(seed=2), tiny.tokenizer()
    tokenizer.padding_side = "right"
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    places = [(parameter.device, parameter.data_ptr()) for parameter in student.parameters()]

    class Careless(ExactMatch):
        def score_text(self, prediction, reference):
            random.random(), np.random.rand(), torch.rand(1)
            return 0.0

    evaluate_retention(student, teacher, [Careless(dataset())], tokenizer)

    assert student.training
    assert not teacher.training
    assert (tokenizer.padding_side, tokenizer.backend_tokenizer.padding) == ("right", None)
    assert random.getstate() == states[0]
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    assert [(parameter.device, parameter.data_ptr()) for parameter in student.parameters()] == places


def test_benchmarks_on_the_same_prompts_share_the_generations(monkeypatch):
    calls, student, teacher = [], tiny.model(seed=1), tiny.model(seed=2)
    for name, model in (("student", student), ("teacher", teacher)):
        model.generate = lambda *a, n=name, f=model.generate, **k: (calls.append(n), f(*a, **k))[1]
    rows = dataset()

    evaluate_retention(student, teacher, [ExactMatch(rows, until=["a"]), Rouge(rows)], tiny.tokenizer())

    assert sorted(calls) == ["student", "teacher"]


def test_chats_go_through_the_template():
    messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    answers = [[{"role": "assistant", "content": "yes"}]] * 4
    tokenizer, seen = tiny.tokenizer(), []

    class Reference(ExactMatch):
        def score_text(self, prediction, reference):
            seen.append(reference)
            return 1.0

    model = tiny.model(seed=1)
    rendered = tokenizer(f"<|user|>{PROMPTS[0]}<|assistant|>")["input_ids"]
    inputs = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    benchmark = Reference(Dataset.from_dict({"prompt": messages, "completion": answers}), batch_size=1)
    evaluate_retention(model, tiny.model(), [benchmark], tokenizer, measure_footprints=False)

    assert [rendered] in inputs
    assert set(seen) == {"yes"}


def test_teachers_generate_as_their_models():
    tokenizer, rows = tiny.tokenizer(), dataset()
    base = tiny.model(seed=1, initializer_range=0.3)
    student = get_peft_model(
        tiny.model(seed=1, initializer_range=0.3),
        LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False),
    )
    written = [one_by_one(base, tokenizer, prompt, 6) for prompt in PROMPTS]
    benchmark = ExactMatch(dataset(written), max_new_tokens=6)

    own_base = evaluate_retention(student, AdapterDisabledTeacher(student), [benchmark], tokenizer).rows[0]
    wrapped = evaluate_retention(tiny.model(seed=3), ModelTeacher(base), [benchmark], tokenizer).rows[0]

    assert own_base.teacher == wrapped.teacher == 1.0
    assert own_base.student < 1.0
    assert len(rows) == own_base.n


def test_a_teacher_that_is_no_model_is_refused_before_anything_is_generated():
    class Cached(Teacher):
        task, vocab_size = "causal_lm", 320

        def config_for_card(self):
            return {}

        def _signals(self, batch, needs, layers):
            raise NotImplementedError

        def prepare(self, accelerator):
            raise NotImplementedError

    student = tiny.model()
    student.generate = None

    with pytest.raises(ValueError, match="Cached has no model that could generate"):
        evaluate_retention(student, Cached(), [ExactMatch(dataset())], tiny.tokenizer())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"until": "\n"}, "expected a list of texts"),
    ],
)
def test_wrong_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ExactMatch(dataset(), **arguments)


def test_an_unknown_rouge_is_refused():
    with pytest.raises(ValueError, match="rouge1, rouge2, rougeL"):
        Rouge(dataset(), "rouge3")


@pytest.mark.parametrize("rows", [tiny.text_dataset(2), Dataset.from_dict({"prompt": [], "completion": []}), [1]])
def test_other_data_is_refused(rows):
    with pytest.raises(ValueError, match="`dataset` has"):
        ExactMatch(rows)


def test_a_missing_tokenizer_and_too_long_prompts_are_refused_before_any_model_runs():
    model = tiny.model()
    model.generate = None

    with pytest.raises(ValueError, match="`tokenizer` is None"):
        evaluate_retention(model, tiny.model(), [ExactMatch(dataset())])
    with pytest.raises(ValueError, match=r"are \d+ tokens, but the student has 256 positions"):
        evaluate_retention(model, tiny.model(), [ExactMatch(dataset(), max_new_tokens=250)], tiny.tokenizer())


def test_an_own_score_is_a_subclass():
    class Length(GenerationBenchmark):
        metric = "length"

        def score_text(self, prediction, reference):
            return float(len(prediction))

    row = evaluate_retention(tiny.model(seed=1), tiny.model(seed=2), [Length(dataset())], tiny.tokenizer()).rows[0]

    assert row.teacher > 0
