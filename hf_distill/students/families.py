"""What each family of models is made of: which dimension of which weight belongs to which width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_distill.anatomy import unwrap


class Axis(StrEnum):
    """What a dimension of a weight runs over."""

    HIDDEN = "hidden"  # channels of the residual stream
    MLP = "mlp"  # neurons
    GATE_UP = "gate_up"  # all neurons of the gate, then all of the up projection
    QUERY = "query"  # query heads, `head_dim` each
    KEY_VALUE = "key_value"  # heads of keys and values, `head_dim` each
    QKV = "qkv"  # queries, then keys, then values
    FREE = "free"  # never cut: the vocabulary, classes, one head


@dataclass(frozen=True)
class Family:
    """The adapter of one family.

    Args:
        name: `config.model_type`.
        mlp_width: The config's attribute for the number of neurons.
        mlp_out: Path in a layer of the projection whose input are the MLP neurons.
        attention_out: Path in a layer of the projection whose input are the outputs of all heads, side by side.
        stream_norms: Paths in a layer of the norms that read the residual stream; their outputs and that of the final
            norm are what is known of its channels. None are listed where the width is not cut.
        layer_axes: Path of a module in a layer -> its axes, (output, input) or (output,) for a norm.
        outer_axes: Name of a module outside of the layers -> the same, embeddings as (tokens, width).
        transposed: Weights are stored as (input, output), as in GPT-2's `Conv1D`.
        scales_embeddings: The embedding's output is multiplied by the square root of the hidden size, and the weight
            of a norm is stored as its distance from 1 (Gemma).
    """

    name: str
    mlp_width: str
    mlp_out: str
    attention_out: str
    layer_axes: Mapping[str, tuple[Axis, ...]]
    outer_axes: Mapping[str, tuple[Axis, ...]]
    stream_norms: tuple[str, ...] = ()
    transposed: bool = False
    scales_embeddings: bool = False

    @property
    def cuts_all(self) -> bool:
        """Whether heads and the hidden width can be cut too: elsewhere only depth and the MLP can.

        The other families compute the width of a head from the hidden size, so one cannot be cut without the other.
        """
        return bool(self.outer_axes)

    def mlp_output(self, layer: nn.Module) -> nn.Module:
        """The down projection of a layer: its input are the neurons, `[..., I]`."""
        return layer.get_submodule(self.mlp_out)

    def attention_output(self, layer: nn.Module) -> nn.Module:
        """The output projection of a layer's attention: its input are the heads' outputs, `[..., H * head_dim]`."""
        return layer.get_submodule(self.attention_out)

    def norms(self, layer: nn.Module) -> list[nn.Module]:
        """The norms of a layer that read the residual stream; their outputs are `[..., D]`."""
        return [layer.get_submodule(path) for path in self.stream_norms]

    def mlp_weights(self, layer: nn.Module) -> list[Tensor]:
        """The weights of a layer's MLP as views with one row for each neuron, each `[I, D]`."""
        views: list[Tensor] = []
        for path, axes in self.layer_axes.items():
            weight = layer.get_submodule(path).weight if {Axis.MLP, Axis.GATE_UP} & set(axes) else None
            if weight is None:
                continue
            weight = weight.T if self.transposed else weight
            weight = weight if axes[0] in (Axis.MLP, Axis.GATE_UP) else weight.T
            views.extend(weight.chunk(2) if Axis.GATE_UP in axes else [weight])
        return views

    def neurons(self, config: PreTrainedConfig) -> int:
        """How many neurons an MLP has."""
        width = getattr(config, self.mlp_width)
        return 4 * config.hidden_size if width is None else width  # GPT-2's `n_inner` may be None

    def axes(self, module: str, kind: str, *, in_layer: bool) -> tuple[Axis, ...]:
        """The axes of a tensor, one for each of its dimensions.

        Args:
            module: Path of the module that holds it, in its layer or in the model.
            kind: "weight" or "bias".
            in_layer: Whether it is in a layer.

        Raises:
            ValueError: The tensor is unknown, so that it could not be cut with the others.
        """
        known = self.layer_axes.get(module) if in_layer else self.outer_axes.get(module.rpartition(".")[2])
        if known is None:
            if not self.cuts_all:
                return ()
            raise ValueError(
                f"The model has {module}.{kind}, which is unknown in the family {self.name!r}: the model was changed "
                "after it was built, or its class is one that cannot be pruned."
            )
        if kind == "bias":
            return known[:1]
        return known[::-1] if self.transposed and in_layer else known


def family_of(model: nn.Module | PreTrainedConfig) -> Family:
    """Find the adapter of a model, wrapped or not, or of a config.

    Raises:
        ValueError: The family has none.
    """
    config: Any = model if isinstance(model, PreTrainedConfig) else unwrap(model).config
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"Models of the family {config.model_type!r} cannot be pruned; known are {', '.join(sorted(FAMILIES))}. "
            "`shrink(teacher, num_hidden_layers=...)` cuts the depth of other families; for more, add an adapter to "
            "hf_distill/students/families.py."
        )
    return FAMILIES[config.model_type]


Axes = dict[str, tuple[Axis, ...]]
_HIDDEN, _FREE = (Axis.HIDDEN,), (Axis.FREE,)
_MLP_IN, _MLP_OUT = (Axis.MLP, Axis.HIDDEN), (Axis.HIDDEN, Axis.MLP)
_OUTER: Axes = {
    "embed_tokens": (Axis.FREE, Axis.HIDDEN),
    "norm": _HIDDEN,
    "lm_head": (Axis.FREE, Axis.HIDDEN),
    "score": (Axis.FREE, Axis.HIDDEN),  # of classifiers
}
_ATTENTION_OUT: Axes = {"self_attn.o_proj": (Axis.HIDDEN, Axis.QUERY)}
_ATTENTION: Axes = {
    "self_attn.q_proj": (Axis.QUERY, Axis.HIDDEN),
    "self_attn.k_proj": (Axis.KEY_VALUE, Axis.HIDDEN),
    "self_attn.v_proj": (Axis.KEY_VALUE, Axis.HIDDEN),
} | _ATTENTION_OUT
_HEAD_NORMS: Axes = {"self_attn.q_norm": _FREE, "self_attn.k_norm": _FREE}
_DOWN: Axes = {"mlp.down_proj": _MLP_OUT}
_GATED: Axes = {"mlp.gate_proj": _MLP_IN, "mlp.up_proj": _MLP_IN} | _DOWN
_FUSED: Axes = {
    "self_attn.qkv_proj": (Axis.QKV, Axis.HIDDEN),
    "mlp.gate_up_proj": (Axis.GATE_UP, Axis.HIDDEN),
}
_PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
_GEMMA_NORMS = ("input_layernorm", "pre_feedforward_layernorm")  # the two others are applied to what is added


def _llama_like(name: str, weights: Mapping[str, tuple[Axis, ...]], **settings: Any) -> Family:
    settings = {"stream_norms": _PRE_NORMS} | settings
    norms = {*_PRE_NORMS, *settings["stream_norms"]}
    if settings.get("scales_embeddings"):
        norms.add("post_feedforward_layernorm")
    return Family(
        name=name,
        mlp_width="intermediate_size",
        mlp_out="mlp.down_proj",
        attention_out="self_attn.o_proj",
        layer_axes={**weights, **dict.fromkeys(sorted(norms), _HIDDEN)},
        outer_axes=_OUTER,
        **settings,
    )


def _mlp_only(
    name: str, first: str, second: str, attention: str, width: str = "intermediate_size", **kind: Any
) -> Family:
    return Family(
        name=name,
        mlp_width=width,
        mlp_out=second,
        attention_out=attention,
        layer_axes={first: _MLP_IN, second: _MLP_OUT},
        outer_axes={},
        **kind,
    )


_GEMMA: dict[str, Any] = {"stream_norms": _GEMMA_NORMS, "scales_embeddings": True}
_KNOWN = (
    *(_llama_like(name, _ATTENTION | _GATED) for name in ("llama", "mistral", "qwen2", "smollm3")),
    _llama_like("qwen3", _ATTENTION | _HEAD_NORMS | _GATED),
    _llama_like("gemma2", _ATTENTION | _GATED, **_GEMMA),
    _llama_like("gemma3_text", _ATTENTION | _HEAD_NORMS | _GATED, **_GEMMA),
    _llama_like("phi3", _FUSED | _ATTENTION_OUT | _DOWN),
    _mlp_only("gpt2", "mlp.c_fc", "mlp.c_proj", "attn.c_proj", "n_inner", transposed=True),
    _mlp_only("gpt_neox", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "attention.dense"),
    _mlp_only("opt", "fc1", "fc2", "self_attn.out_proj", "ffn_dim"),
    _mlp_only("bert", "intermediate.dense", "output.dense", "attention.output.dense"),
)
FAMILIES = {family.name: family for family in _KNOWN}
