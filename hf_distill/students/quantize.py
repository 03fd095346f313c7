"""From a student to a model folder with quantised weights, in one call."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_distill.anatomy import unwrap
from hf_distill.quantization import quantization_of
from hf_distill.students.quantize_check import Row, check_rows, measure_agreement
from hf_distill.students.quantize_report import QuantizeReport, measure_storage
from hf_distill.students.quantizers import Quantizer, resolve_quantizer
from hf_distill.students.quantizers.base import Source, load_plain, model_class


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json")


def quantize(
    model_or_folder: PreTrainedModel | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    method: str = "int8",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    group_size: int | None = None,
    check: Iterable[Row] | None = None,
) -> QuantizeReport:
    """Quantise a student's linear layers, write the folder, and say what that saved and cost.

    The folder is loaded by `from_pretrained(folder)`, with GGUF by `from_pretrained(folder, gguf_file=...)`; it holds
    the tokenizer too, and the report in `quantize_report.json`. It appears when it is whole. The student is left as
    it is.

    Args:
        model_or_folder: A model with real weights, or the folder of one.
        folder: Where to write; it must not exist yet, or be empty.
        method: "int8" (torchao), "w8a16" or "w4a16" (compressed-tensors, which vLLM reads), "nf4" or "int8-bnb"
            (bitsandbytes), "gguf-q8_0" or "gguf-q4_0" (llama.cpp).
        tokenizer: Written beside the model; taken from `model_or_folder` where that is a folder that has one.
        group_size: Weights of a row that share a scale, for "int8", "w8a16" and "w4a16"; None for the method's choice.
        check: Rows of token ids on which what was written is read again and compared with the student.

    Returns:
        Real bytes, bits per weight, what was left, and with `check` the KL to the student.

    Raises:
        ValueError: An argument is wrong, the student is quantised already or has adapters, or the format cannot hold
            it; nothing was computed or written by then.
        ImportError: The method's package is not installed; the message has the line that installs it.

    Example:
        >>> report = quantize("student", "student-w4a16", "w4a16", check=rows)
        >>> print(report)
    """
    quantizer = resolve_quantizer(method, group_size)
    target = check_target(folder)
    with open_source(model_or_folder, tokenizer) as source:
        reference = model_or_folder if isinstance(model_or_folder, PreTrainedModel) else None
        return write_quantized(quantizer, source, target, check, reference)


def load_quantized(folder: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Load what `quantize` wrote, whatever the method, in eval mode.

    Args:
        folder: The model folder.
        **kwargs: For `from_pretrained`, such as `dtype`.

    Raises:
        ValueError: It has no report of `quantize`.
    """
    report = QuantizeReport.load(folder)
    if report.gguf_file is None:
        return load_plain(Path(folder), **kwargs)
    return resolve_quantizer(report.method).load(Path(folder), **kwargs)


def write_quantized(
    quantizer: Quantizer,
    source: Source,
    target: Path,
    check: Iterable[Row] | None,
    reference: PreTrainedModel | None,
) -> QuantizeReport:
    """Check, write, read again, measure, and put the folder in its place.

    Args:
        quantizer: The method.
        source: What is quantised.
        target: The folder; see `check_target`.
        check: Rows to compare on.
        reference: The model to compare with; None for that of `source`.
    """
    quantizer.check(source.model, source.tokenizer)
    rows = None if check is None else check_rows(check, source.model)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        written = Path(scratch) / "written"
        written.mkdir()
        with torch.random.fork_rng():
            quantizer.write(source, written)
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(written)
        agreement: dict[str, Any] = {}
        if rows is not None:
            reference = source.load() if reference is None else reference
            again = quantizer.load(written, dtype=source.model.dtype, device_map={"": reference.device})
            agreement = vars(measure_agreement(reference, again, rows))
        report = QuantizeReport(
            method=quantizer.method,
            backend=quantizer.package,
            backend_version=quantizer.backend_version,
            group_size=quantizer.group_size,
            gguf_file=next((file.name for file in written.glob("*.gguf")), None),
            weight_bytes_before=sum(file.stat().st_size for file in source.folder.glob("*.safetensors")),
            weight_bytes=sum(file.stat().st_size for file in quantizer.weight_files(written)),
            **measure_storage(quantizer, written, source.model),
            **agreement,
        )
        report.save(written)
        written.rename(target)  # replaces an empty folder
    return report


def check_target(folder: str | os.PathLike[str]) -> Path:
    """Return the folder to write.

    Raises:
        ValueError: There is something in it.
    """
    target = Path(folder).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"`folder` is {str(folder)!r}, which exists; expected a new or empty folder.")
    return target


@contextmanager
def open_source(
    model_or_folder: PreTrainedModel | str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[Source]:
    """The student as a folder and as a model; one in memory is written to a temporary folder.

    Raises:
        ValueError: It is not a student that can be quantised.
    """
    if isinstance(model_or_folder, nn.Module):
        model = check_model(model_or_folder)
        with tempfile.TemporaryDirectory(prefix="hf_distill-") as scratch:
            model.save_pretrained(scratch)
            yield Source(Path(scratch), model, tokenizer)
        return
    path = Path(os.path.expanduser(model_or_folder))
    config = _check_folder(path)
    # Names and shapes are enough for every check; the weights are read by what writes them.
    with torch.device("meta"):
        model = model_class(config)._from_config(config, dtype=config.dtype or torch.float32)
    if tokenizer is None and any((path / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = AutoTokenizer.from_pretrained(path)
    yield Source(path, model, tokenizer)


def check_model(model: nn.Module) -> PreTrainedModel:
    """Return the model inside its wrappers.

    Raises:
        ValueError: It is quantised, has adapters, or its weights are not all here.
    """
    base = unwrap(model)
    if base is not model or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"The student is a {type(model).__name__} with a model or adapters inside; give plain weights: "
            "`model = model.merge_and_unload()` for LoRA, `trainer.accelerator.unwrap_model(model)` for others."
        )
    _check_unquantized(base.config, "The student")
    if any(hasattr(module, "weight_fake_quantizer") for module in base.modules()):
        raise ValueError("The student was prepared for rounding; write it with `convert_qat(model, folder)`.")
    for name, parameter in base.named_parameters():
        if parameter.is_meta or hasattr(parameter, "ds_id") or hasattr(parameter, "placements"):
            raise ValueError(
                f"The student's weight {name!r} is offloaded or sharded; save it with "
                "`trainer.save_model(folder)` and quantise that folder."
            )
    return base


def _check_folder(path: Path) -> Any:
    """The config of a model folder.

    Raises:
        ValueError: It is no model folder, holds an adapter alone, or quantised weights.
    """
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ValueError(
            f"{str(path)!r} holds a LoRA adapter without its base; merge them first: "
            "`AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(merged)`."
        )
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise ValueError(
            f"`model_or_folder` is {str(path)!r}; expected a model, or a folder with config.json and safetensors, as "
            "`save_pretrained` writes it."
        )
    config = AutoConfig.from_pretrained(path)
    _check_unquantized(config, repr(str(path)))
    return config


def _check_unquantized(config: Any, what: str) -> None:
    found = quantization_of(config)
    if found is not None:
        raise ValueError(
            f"{what} is quantised already ({found}), and its weights would be rounded twice; give the model that it "
            "was made of."
        )
