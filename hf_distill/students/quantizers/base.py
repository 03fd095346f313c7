"""What every quantiser does, and what is read from the files that it writes."""

from __future__ import annotations

import json
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a weight file.

    Args:
        name: Of the parameter in transformers, or of a part of it: a scale, a packed weight.
        format: Its format in the file: "BF16", "I8", "Q4_0".
        bytes: Without the header of the file.
    """

    name: str
    format: str
    bytes: int


@dataclass(frozen=True)
class Source:
    """What is quantised.

    Args:
        folder: Of the unquantised model, as `save_pretrained` writes it.
        model: The same model; its weights may be on the meta device.
        tokenizer: Of the model, if there is one.
    """

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None

    def load(self, **kwargs: Any) -> PreTrainedModel:
        """A copy of the model with its weights, in its own dtype unless another is asked for."""
        return load_plain(self.folder, **({"dtype": self.model.dtype} | kwargs))


class Quantizer(ABC):
    """Writes a model folder with quantised weights.

    Args:
        method: Its name in `quantize`.
        group_size: Weights of a row that share a scale; None for the method's own choice.

    Raises:
        ValueError: The method takes no such group size.
    """

    package: ClassVar[str]
    module: ClassVar[str]
    extra: ClassVar[str]

    def __init__(self, method: str, group_size: int | None = None) -> None:
        if group_size is not None and group_size < 1:
            raise ValueError(f"`group_size` is {group_size}; expected 32, 64 or 128, or None for the method's choice.")
        self.method = method
        self.group_size = group_size

    @property
    @abstractmethod
    def formats(self) -> frozenset[str]:
        """The formats of tensors that hold quantised weights."""

    @abstractmethod
    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Refuse what cannot be quantised; the model's weights may be on the meta device.

        Raises:
            ValueError: The family, a width or the tokenizer is not one that the format can hold.
        """

    @abstractmethod
    def write(self, source: Source, folder: Path) -> None:
        """Write the weights of `source` into `folder`."""

    def load(self, folder: Path, **kwargs: Any) -> PreTrainedModel:
        """What it wrote, read by transformers, in eval mode."""
        return load_plain(folder, **kwargs)

    def stored(self, folder: Path, model: PreTrainedModel) -> list[StoredTensor]:
        """Every tensor in the weight files of a folder that it wrote."""
        return [tensor for file in sorted(folder.glob("*.safetensors")) for tensor in read_header(file)]

    def weight_files(self, folder: Path) -> list[Path]:
        """The files of a folder that hold weights."""
        return sorted(folder.glob("*.safetensors"))

    def check_installed(self) -> None:
        """Refuse to go on without the package.

        Raises:
            ImportError: It is not installed.
        """
        if find_spec(self.module) is None:
            raise ImportError(
                f"`method={self.method!r}` needs {self.package}, which is not installed: "
                f'`pip install "hf_distill[{self.extra}]"`.'
            )

    @property
    def backend_version(self) -> str:
        """The version of the package that writes."""
        return version(self.package)


def model_class(config: PreTrainedConfig) -> Any:
    """The class that a config names.

    Raises:
        ValueError: It names none that transformers has.
    """
    name = (config.architectures or [""])[0]
    if not hasattr(transformers, name):
        raise ValueError(
            f"config.json names the architectures {config.architectures}; expected a class of transformers, as "
            "`save_pretrained` writes it. Models with code of their own cannot be quantised."
        )
    return getattr(transformers, name)


def load_plain(folder: Path, **kwargs: Any) -> PreTrainedModel:
    """A model folder, read by the class that its config names, in eval mode.

    Raises:
        ValueError: `from_pretrained` does not know one of the arguments.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    try:
        return model_class(config).from_pretrained(folder, **kwargs).eval()
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(
            f"`model_kwargs` is {kwargs}: {error}. Expected arguments of `from_pretrained`, such as "
            '{"attn_implementation": "eager"}.'
        ) from error


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The layers that are quantised: every `nn.Linear` but those that transformers keeps, such as the head.

    Raises:
        ValueError: There is none.
    """
    kept = get_keys_to_not_convert(model)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and should_convert_module(name, kept)
    }
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear below its head that could be quantised; expected a family with "
            "linear layers, such as Llama or Qwen (GPT-2 has Conv1D instead)."
        )
    return layers


def check_multiples(model: PreTrainedModel, method: str, inputs: int, outputs: int = 1, hint: str = "") -> None:
    """Refuse layers whose widths are not multiples of what a format needs.

    Raises:
        ValueError: The first such layer, by name.
    """
    for name, layer in linear_layers(model).items():
        if layer.in_features % inputs or layer.out_features % outputs:
            raise ValueError(
                f"`method={method!r}` needs inputs in multiples of {inputs}"
                + (f" and outputs in multiples of {outputs}" if outputs > 1 else "")
                + f", but {name!r} has {layer.in_features} inputs and {layer.out_features} outputs{hint}"
            )


def read_header(file: Path) -> list[StoredTensor]:
    """Names, formats and sizes of the tensors of a safetensors file, without reading them."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header: Mapping[str, Any] = json.loads(opened.read(length))
    return [
        StoredTensor(name, entry["dtype"], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    ]
