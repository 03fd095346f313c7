from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from hf_distill.anatomy import describe, output_head, resolve_final_norm, resolve_head
from hf_distill.taps import tap_last_hidden
from tests import tiny
from tests.processes import run_on_two_ranks


IDS = torch.randint(5, 300, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_pre_hooks) + len(module._forward_hooks) + len(module._backward_hooks)
        for module in model.modules()
    )


def tapped_loss(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with tap_last_hidden(model) as tap:
        model(input_ids=ids)
    return cross_entropy(resolve_head(model)(tap.hidden.flatten(0, 1)), ids.flatten())


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def plain_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    twin = copy.deepcopy(model)
    cross_entropy(twin(input_ids=IDS).logits.flatten(0, 1), IDS.flatten()).backward()
    return gradients(twin)


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_tapped_forward_gives_the_gradients_of_the_plain_one_and_no_logits(family):
    model = tiny.model(family)
    expected = plain_gradients(model)
    before, state = hooks(model), set(vars(output_head(model)))
    with tap_last_hidden(model) as tap:
        output = model(input_ids=IDS)
    assert output.logits.shape == (2, 0, 320)
    assert tap.hidden.shape == (2, 7, 32)
    tapped_loss(model).backward()
    assert_same_gradients(gradients(model), expected)
    assert (hooks(model), set(vars(output_head(model)))) == (before, state)


def test_hooks_are_removed_after_an_exception():
    model = tiny.model("llama")
    before = hooks(model)
    with pytest.raises(KeyError), tap_last_hidden(model):
        raise KeyError
    assert hooks(model) == before
    assert model(IDS).logits.shape == (2, 7, 320)


def test_an_empty_tap_says_that_the_model_was_not_called():
    with tap_last_hidden(tiny.model("llama")) as tap, pytest.raises(RuntimeError, match="call the model"):
        _ = tap.hidden


def test_a_head_that_runs_twice_in_one_tap_is_an_error():
    model = tiny.model("llama")
    with tap_last_hidden(model) as tap:
        model(IDS)
        with pytest.raises(RuntimeError, match="twice"):
            resolve_head(get_peft_model(model, LoraConfig(target_modules=["lm_head"])))(tap.hidden)


def test_flat_hidden_states_are_recorded_as_they_come():
    model = tiny.model("llama")
    with tap_last_hidden(model) as tap:
        logits = model.lm_head(torch.ones(5, 32))
    assert (tap.hidden.shape, logits.shape) == ((5, 32), (0, 320))


def test_a_classifier_cannot_be_tapped():
    model = tiny.model("bert", task="sequence_classification")
    with pytest.raises(ValueError, match="no output embeddings"), tap_last_hidden(model):
        pass


def test_nothing_is_recorded_for_backward_under_no_grad():
    model = tiny.model("llama")
    with torch.no_grad(), tap_last_hidden(model) as tap:
        model(IDS)
    assert not tap.hidden.requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = tiny.model("llama")
    expected = plain_gradients(model)
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    tapped_loss(model).backward()
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
def test_autocast_reaches_the_hidden_states_and_the_head(family):
    model = tiny.model(family)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(IDS).logits
        with tap_last_hidden(model) as tap:
            model(IDS)
        logits = resolve_head(model)(tap.hidden)
    assert logits.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["lm_head"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["dora", "modules_to_save"],
)
def test_an_adapter_on_the_head_gets_its_gradients(config):
    model = get_peft_model(tiny.model("llama"), LoraConfig(r=4, **config))
    expected = plain_gradients(model)
    tapped_loss(model).backward()
    assert any("lm_head" in name for name in expected)
    assert_same_gradients(gradients(model), expected)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("find_unused_parameters", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_ddp_finds_every_parameter_of_the_tapped_model(find_unused_parameters, tied):
    model = tiny.model("llama", tie_word_embeddings=tied)
    expected = plain_gradients(model)
    parallel = DistributedDataParallel(model, find_unused_parameters=find_unused_parameters)
    for _ in range(2):  # DDP complains in the forward that follows an unfinished backward
        parallel.zero_grad()
        tapped_loss(parallel).backward()
    assert_same_gradients(gradients(model), expected)


def test_a_compiled_model_can_be_tapped_again_and_again():
    torch.compiler.reset()
    model = tiny.model("llama")
    compiled = torch.compile(model, backend="eager")
    for seed in range(3):
        ids = torch.randint(5, 300, (2, 7), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            with tap_last_hidden(compiled) as tap:
                compiled(input_ids=ids)
            expected = model(input_ids=ids).logits
            torch.testing.assert_close(resolve_head(compiled)(tap.hidden), expected, atol=1e-5, rtol=0)
    with torch.no_grad():
        assert compiled(input_ids=IDS).logits.shape == (2, 7, 320)


def shard(model: nn.Module, how: str, tied: bool) -> None:
    """Apply FSDP2 layer by layer; the rest in one group, or last norm and head on their own as accelerate does."""
    parts = describe(model)
    for layer in parts.layers:
        fully_shard(layer)
    if how == "accelerate":
        embedding = [model.get_input_embeddings()] if tied else []
        fully_shard([parts.final_norm, *embedding, parts.lm_head], reshard_after_forward=False)
    fully_shard(model, reshard_after_forward=how == "resharded")


def every_layout(rank: int) -> None:
    for how, tied in product(["resharded", "kept", "accelerate"], [False, True]):
        compare_to_one_process(rank, how, tied)


def compare_to_one_process(rank: int, how: str, tied: bool) -> None:
    model = tiny.model("llama", tie_word_embeddings=tied)
    twin = copy.deepcopy(model)
    # Hidden states of another layer pass the last norm outside of the model's forward.
    others = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    loss = cross_entropy(twin(input_ids=IDS).logits.flatten(0, 1), IDS.flatten())
    (loss + (twin.model.norm(others) ** 3).mean()).backward()
    shard(model, how, tied)
    for _ in range(2):
        model.zero_grad()
        norm = resolve_final_norm(model)
        loss = tapped_loss(model, IDS[rank : rank + 1])  # as many labels on both ranks: the mean of the means
        (loss + (norm(others[rank]) ** 3).mean()).backward()
    found = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    assert_same_gradients(found, gradients(twin))


def test_two_fsdp2_ranks_get_the_gradients_of_one_process(tmp_path):
    run_on_two_ranks(every_layout, tmp_path)
