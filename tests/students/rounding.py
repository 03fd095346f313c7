"""Every rounding once more, written down from its definition."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

from tests import tiny


PACKAGES = {
    "int8": "torchao",
    "w8a16": "compressed_tensors",
    "w4a16": "compressed_tensors",
    "nf4": "bitsandbytes",
    "int8-bnb": "bitsandbytes",
    "gguf-q8_0": "gguf",
    "gguf-q4_0": "gguf",
}
# Appendix E of QLoRA (arXiv:2305.14314).
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
WIDTHS = {"hidden_size": 64, "intermediate_size": 128}
IDS = torch.randint(5, 300, (2, 12), generator=torch.Generator().manual_seed(0))


def needs(package: str) -> pytest.MarkDecorator:
    """Skip without an optional package, saying which."""
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


def each_method(*names: str) -> list:
    """The methods as parameters of a test, each skipped without its package."""
    return [pytest.param(name, marks=needs(PACKAGES[name])) for name in names or PACKAGES]


def student(family: str = "llama", **config) -> nn.Module:
    """A model whose layers matter: weights as large as trained ones, and biases."""
    model = tiny.model(family, **(WIDTHS | config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and "norm" not in name:
                parameter.mul_(3)
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    return model


def round_weight(weight: Tensor, method: str, group_size: int | None = None) -> Tensor:
    """The values `[out, in]` that a format keeps of a matrix."""
    size = {"nf4": 64, "gguf-q8_0": 32, "gguf-q4_0": 32}.get(method, group_size or weight.shape[1])
    groups = weight.float().reshape(-1, size)
    largest = groups.abs().amax(1, keepdim=True).clamp(min=1e-30)  # a padding token's embedding is zero
    if method == "nf4":
        nearest = (groups[..., None] / largest[..., None] - NF4).abs().argmin(-1)
        rounded = NF4[nearest] * largest
    elif method == "gguf-q4_0":
        signed = groups.gather(1, groups.abs().argmax(1, keepdim=True))
        scale = torch.where(signed == 0, 1e-30, signed) / -8
        levels = (groups * (1 / scale) + 8.5).floor().clamp(max=15) - 8
        rounded = levels * scale.half().float()
    elif method == "gguf-q8_0":
        levels = groups * (1 / (largest / 127))
        rounded = levels.sign() * (levels.abs() + 0.5).floor() * (largest / 127).half().float()
    else:
        steps = {"int8": 127.5, "int8-bnb": 127, "w8a16": 127.5, "w4a16": 7.5}
        steps |= {"qat8": 127.5, "qat4": 7.5}
        steps = steps[method]
        low, high = (-8, 7) if steps == 7.5 else (-128, 127)
        scale = largest / steps
        # The largest weight is half way between two levels, so the last bit of the product decides.
        levels = groups * (1 / scale) if method in ("int8", "qat4", "qat8") else groups / scale
        rounded = levels.round().clamp(low, high) * scale
    return rounded.reshape(weight.shape)


def naive_twin(model: nn.Module, method: str, group_size: int | None = None) -> nn.Module:
    """The student with its weights rounded in place: layers, and with GGUF the embedding and the head."""
    twin = copy.deepcopy(model)
    embeddings = {id(twin.get_input_embeddings()), id(twin.get_output_embeddings())}
    with torch.no_grad():
        for module in twin.modules():
            if id(module) in embeddings and method.startswith("gguf"):
                if module is twin.get_input_embeddings() or not twin.config.tie_word_embeddings:
                    module.weight.copy_(round_weight(module.weight, "gguf-q8_0"))
            elif isinstance(module, nn.Linear) and id(module) not in embeddings:
                module.weight.copy_(round_weight(module.weight, method, group_size))
    return twin


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    """In fp32, `[B, S, V]`."""
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()
