"""Taps of queries, keys and values, in the function that transformers dispatches attention to."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from hf_distill.anatomy import Anatomy, describe
from hf_distill.attention_anatomy import TAPPED, attention_function, check_tappable, interface_modules, projections
from hf_distill.signals import AttentionStates, Visibility
from hf_distill.taps.limits import refuse_reentrant_checkpoints
from hf_distill.taps.recorder import Recorder


# What enters the scores besides queries, keys and the mask: learned sinks, relative positions.
OTHER_SCORES = ("s_aux", "position_bias")


class AttentionTap(Recorder[AttentionStates]):
    """Queries, keys and values of one forward call, by layer."""

    opened_by = "tap_attention"

    def _record(self, layer: int, states: AttentionStates) -> None:
        if states.key.shape[2] != states.query.shape[2]:
            raise ValueError(
                f"Layer {layer} has {states.query.shape[2]} queries and {states.key.shape[2]} keys; attention can be "
                "compared within one sequence only: no cache, no prefix tuning."
            )
        super()._record(layer, states)


@contextmanager
def tap_attention(model: nn.Module, layers: Collection[int]) -> Iterator[AttentionTap]:
    """Record what goes into the attention of some layers in the model's next forward call.

    The model runs its own implementation (eager, SDPA, FlashAttention), under a name by which the call is heard; its
    configs are as they were when the context is left. Families that do not use transformers' `AttentionInterface`
    give the outputs of their projections, before the position embedding: enough for relations, not for maps.

    Args:
        model: Any model that `describe` knows, wrapped or not.
        layers: From 1 to the number of layers. Without any, nothing is asked of the model.

    Raises:
        ValueError: A layer does not exist, its attention cannot be heard, or gradient checkpointing is reentrant,
            which would lose the gradient of what is recorded.
        RuntimeError: The model runs more than once inside the context, or has an open tap on one of the layers.
    """
    tap = AttentionTap(layers)
    if not layers:
        yield tap
        return
    parts = describe(model)
    if outside := sorted(layer for layer in layers if not 1 <= layer <= parts.num_layers):
        raise ValueError(f"`layers` holds {outside}; expected layers from 1 to {parts.num_layers}.")
    refuse_reentrant_checkpoints(parts)
    with ExitStack() as stack:
        for layer in sorted(set(layers)):
            module = parts.layers[layer - 1]
            if module in _open_layers:
                raise RuntimeError(f"Layer {layer} has an open `tap_attention` already: leave it first.")
            check_tappable(module)
            listen = _listen_to_calls if interface_modules(module) else partial(_listen_to_projections, parts)
            stack.enter_context(listen(module, tap, layer))
        yield tap


# The tap that is open on a layer and the layer's number, by every module inside the layer: the attention says which
# one it is when it is called.
_open_layers: WeakKeyDictionary[nn.Module, tuple[AttentionTap, int]] = WeakKeyDictionary()


@contextmanager
def _listen_to_calls(layer: nn.Module, tap: AttentionTap, number: int) -> Iterator[None]:
    """Let the configs of a layer name the function that tells a tap what it was called with."""
    modules = list(layer.modules())
    configs = {id(module.config): module.config for module in interface_modules(layer)}
    found = [(config, config._attn_implementation) for config in configs.values()]
    for _, own in found:
        _register(own)
    _open_layers.update(dict.fromkeys(modules, (tap, number)))
    for config, own in found:
        config._attn_implementation_internal = _tapped_name(own)
    try:
        yield
    finally:
        for config, own in found:
            config._attn_implementation_internal = own
        for module in modules:
            del _open_layers[module]


def _tapped_name(own: str) -> str:
    # Layers share a config, and two taps may share a model. "flash" stays part of the name: transformers looks for it.
    return own if own.startswith(TAPPED) else TAPPED + own


def _register(own: str) -> None:
    """Make the tapped name of an implementation known to transformers."""
    name = _tapped_name(own)
    if name in ALL_MASK_ATTENTION_FUNCTIONS:
        return
    AttentionInterface.register(name, partial(_attention, own))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[own])


def _attention(
    own: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """What the tapped name stands for: the model's own function, heard."""
    _hear(own, module, query, key, value, attention_mask, kwargs)
    with _own_name(module.config, own):
        return attention_function(module, own)(module, query, key, value, attention_mask, **kwargs)


@contextmanager
def _own_name(config: PreTrainedConfig, own: str) -> Iterator[None]:
    """FlashAttention looks up by the name in the config which of its kernels to run."""
    tapped = config._attn_implementation
    config._attn_implementation_internal = own
    try:
        yield
    finally:
        config._attn_implementation_internal = tapped


@torch.compiler.disable
def _hear(
    own: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: Mapping[str, Any],
) -> None:
    tap, layer = _open_layers.get(module, (None, 0))
    if tap is None or not tap._hears():
        return
    scaling = kwargs.get("scaling")
    states = AttentionStates(
        query=query,
        key=key,
        value=value,
        visibility=_visibility(own, module, query, mask, kwargs),
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        has_maps=all(kwargs.get(name) is None for name in OTHER_SCORES),
    )
    tap._record(layer, states)


def _visibility(
    own: str, module: nn.Module, query: Tensor, mask: Tensor | None, kwargs: Mapping[str, Any]
) -> Visibility:
    """Which keys a query sees, as the implementation reads its arguments."""
    if mask is not None and mask.dim() == 4:
        return Visibility(mask=mask.expand(len(query), -1, query.shape[2], -1))
    if own == "eager":
        return Visibility()
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if own == "sdpa":
        return Visibility(causal=causal)
    documents = _documents(query.shape[2], kwargs) if mask is None else None
    padding = None if mask is None else mask.bool()
    return Visibility(causal=causal, window=kwargs.get("sliding_window"), padding=padding, documents=documents)


def _documents(length: int, inputs: Mapping[str, Any]) -> Tensor | None:
    """The document of each token in rows without a mask, `[1 or B, S]`."""
    bounds, positions = inputs.get("cu_seq_lens_q"), inputs.get("position_ids")
    if bounds is not None:
        return torch.bucketize(torch.arange(length, device=bounds.device), bounds[1:], right=True)[None]
    if positions is None or positions.dim() != 2:
        return None
    return nn.functional.pad((positions.diff() != 1).cumsum(-1), (1, 0))


@contextmanager
def _listen_to_projections(parts: Anatomy, layer: nn.Module, tap: AttentionTap, number: int) -> Iterator[None]:
    """Put the outputs of a layer's projections together when the layer is left."""
    heard: dict[int, Tensor] = {}
    inputs: dict[str, Any] = {}

    def before(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.update(inspect.signature(decoder.forward).bind(*args, **kwargs).arguments)

    def project(place: int, module: nn.Module, args: Any, output: Tensor) -> None:
        if tap._hears():
            heard.setdefault(place, output[:, None])  # some project their relative positions afterwards

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if tap._hears():
            rules = inputs | {"is_causal": parts.task == "causal_lm"}
            # The model itself is given what FlashAttention is: padding as `[B, S]`, or positions.
            visibility = _visibility("flash", module, heard[0], inputs.get("attention_mask"), rules)
            tap._record(number, AttentionStates(heard[0], heard[1], heard[2], visibility, 1.0, has_maps=False))
            heard.clear()

    _open_layers[layer] = (tap, number)
    handles = [parts.decoder.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    try:
        for place, module in enumerate(projections(layer)):
            handles.append(module.register_forward_hook(partial(project, place)))
        yield
    finally:
        del _open_layers[layer]
        for handle in handles:
            handle.remove()
