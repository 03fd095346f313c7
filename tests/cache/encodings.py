"""A teacher's output, and what becomes of it when it is written and read again."""

import numpy as np
import torch

from hf_distill.cache.registry import encoding_from_config, make_encoding
from hf_distill.functional import LMHead, linear_distillation_loss
from hf_distill.signals import Projection


VOCAB = 203  # not a multiple of anything
TEMPERATURES = (1.0, 0.5, 2.0)


def teacher(count=40, vocab_size=VOCAB, seed=0, dtype=torch.float32, scale=0.7):
    """What enters a teacher's head, and the head."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, 16, generator=generator)
    weight = torch.randn(vocab_size, 16, generator=generator) * scale
    return Projection(hidden.to(dtype), LMHead(weight.to(dtype)))


def labels_of(output, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, output.head(output.hidden[:1]).shape[1], output.hidden.shape[:1], generator=generator)


def uniforms_of(output, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(output.hidden), dtype=torch.float64, generator=generator)


def log_probs_at(output, temperature=1.0):
    """The whole distribution, `[N, V]` float64."""
    return torch.log_softmax(output.head(output.hidden).double() / temperature, -1)


def observed(name, output, uniforms=None, temperatures=(1.0,), **options):
    """An encoding, and its columns of a teacher's output."""
    encoding = make_encoding(name, vocab_size=VOCAB, temperatures=temperatures, **options)
    uniforms = uniforms_of(output) if uniforms is None and encoding.samples else uniforms
    return encoding, encoding.observe(output, labels_of(output), uniforms)


def stored(name, output, uniforms=None, temperatures=(1.0,), **options):
    """The targets that come back from a shard, read by an encoding that was made of the config of the first."""
    encoding, columns = observed(name, output, uniforms, temperatures, **options)
    reader = encoding_from_config(encoding.config())
    reader.attach(encoding.shared_tensors(output))
    read = reader.open(encoding.pack(columns))
    return reader.targets(read(np.arange(len(output.hidden))), labels_of(output))


def loss(student, labels, targets, temperature=1.0, term="forward_kl", metrics=()):
    """The loss of a student against targets of any kind, and the gradient of its hidden states."""
    hidden = student.hidden.clone().requires_grad_()
    if isinstance(targets, Projection):
        teacher = {"teacher_hidden": targets.hidden, "teacher_head": targets.head}
    else:
        teacher = {"teacher_targets": targets}
    out = linear_distillation_loss(
        hidden, student.head, labels, terms={term: 1.0}, temperature=temperature, metrics=metrics, **teacher
    )
    out.loss.backward()
    return out.loss.item(), hidden.grad
