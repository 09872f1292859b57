"""Support models with adapters of ``peft``: make them from a config, and separate slim adapters from their base.

    oto = OTO(peft_model, example, prune_frozen=True, layout="uniform")     # uniform: the config states the sizes
    optimizer = oto.lhspg(variant="adamw", lr=1e-3, target_params=0.6, total_steps=1000)
    ...                                                                     # train
    slim = slim_adapters(oto.construct_subnet().model)
    slim.save_pretrained("adapters")                                        # the adapters alone
    slim.unload().save_pretrained("slim")                                   # the base; last, as it removes adapters

``PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("slim"), "adapters")`` loads the slim model without
``oto``.

Only this file uses classes of peft, which is not imported before it is used.
"""

from __future__ import annotations

import copy
import functools
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from oto.errors import OptionError, some
from oto.slim.config.recipe import Maker, makers

KIND = "LORA"
"""The kind of adapters that can be separated from their base."""


def _adapted(model: Any) -> Any:
    """The module ``peft`` if the model is a ``PeftModel``, else ``None``."""
    peft: Any = sys.modules.get("peft")  # it is imported if the model is one of peft
    return peft if peft is not None and isinstance(model, peft.PeftModel) else None


def makers_of_adapted(model: Any) -> Iterator[Maker]:
    """Functions that may make a model of peft with one adapter: its base from a config, and the adapter on it.

    Yields:
        A function of a config, and the config of the model's base.
    """
    peft, own = _adapted(model), dict(getattr(model, "peft_config", {}))
    if peft is None or len(own) != 1:
        return
    ((name, settings),) = own.items()
    for kind, config in makers(model.get_base_model()):
        yield functools.partial(_make, kind, settings, name), config


def _make(kind: Any, settings: Any, name: str, config: Any) -> nn.Module:
    made: nn.Module = sys.modules["peft"].get_peft_model(kind(config), copy.deepcopy(settings), adapter_name=name)
    return made


def slim_adapters(model: Any, base: nn.Module | None = None) -> Any:
    """The slim model as an ordinary ``PeftModel``: slim adapters on a slim base.

    Its ``save_pretrained`` writes the adapters alone, which ``PeftModel.from_pretrained`` loads onto the same base;
    ``merge_and_unload()`` returns the merged model.

    Args:
        model: The model of a subnet whose full model was a ``PeftModel`` with one adapter; it is not changed.
        base: A slim base of the same sizes for the adapters; by default a copy of their current one.

    Returns:
        A ``PeftModel``. If adapters have different ranks, its config states each (``rank_pattern``).

    Raises:
        OptionError: The model is not a ``PeftModel``, has several adapters, or adapters other than LoRA; or ``base``
            has layers of other sizes.
    """
    peft = _adapted(model)
    if peft is None:
        raise OptionError(
            f"a {type(model).__name__} has no adapters of peft\n  effect  nothing was made\n"
            "  to fix  pass subnet.model of an OTO(get_peft_model(...), ...)"
        )
    name, settings = _only(model)
    state = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    base = copy.deepcopy(model).unload() if base is None else base
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied weights or an adapted base; these came when the model was made
        made = peft.get_peft_model(base, _as_it_is(model, settings, name), adapter_name=name)
    shapes = {key: tuple(held.shape) for key, held in peft.get_peft_model_state_dict(made, adapter_name=name).items()}
    if other := [key for key, held in state.items() if shapes.get(key) != tuple(held.shape)]:
        raise OptionError(
            f"the base has layers of other sizes than the slim model: {some(other)}\n"
            "  effect  the adapters do not fit it\n  to fix  a base of the same subnet, or leave base= out"
        )
    peft.set_peft_model_state_dict(made, state, adapter_name=name)
    return made.train(model.training)


def refuse_layers_alone(model: nn.Module) -> None:
    """Check that a model with layers of peft contains the ``PeftModel`` around them.

    Raises:
        OptionError: It does not; the message says which model to use.
    """
    peft: Any = sys.modules.get("peft")
    if peft is None or any(isinstance(module, peft.PeftModel) for module in model.modules()):
        return
    layers = [name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    if layers:
        raise OptionError(
            f"this {type(model).__name__} has adapters of peft in {some(layers, 2)}, but is no PeftModel itself\n"
            "  effect  slim_adapters could not tell the slim adapters from their base, so nothing was made\n"
            "  to fix  give OTO what get_peft_model(model, config) returned, not the model in it; instead of"
            " model.add_adapter(...) or inject_adapter_in_model, call get_peft_model"
        )


def _only(model: Any) -> tuple[str, Any]:
    """The name and the settings of a model's only adapter.

    Raises:
        OptionError: There are several, or it is not a LoRA adapter.
    """
    own = dict(model.peft_config)
    if len(own) > 1:
        raise OptionError(
            f"the model has {len(own)} adapters: {some(own)}\n  effect  it cannot be said which of them was pruned\n"
            "  to fix  before OTO(...), delete_adapter(...) or merge (add_weighted_adapter) all but one"
        )
    ((name, settings),) = own.items()
    kind = str(getattr(settings.peft_type, "value", settings.peft_type))
    if kind != KIND:
        raise OptionError(
            f"the adapters are of the kind {kind}, and only those of {KIND} are told from their base\n"
            "  effect  nothing was made\n  to fix  merge_and_unload(), and take the merged model"
        )
    return name, settings


def _as_it_is(model: Any, settings: Any, name: str) -> Any:
    """The settings with the current ranks of adapters, and without an initialization that would change the base."""
    settings = copy.deepcopy(settings)
    settings.init_lora_weights = True
    peft, found = sys.modules["peft"], list[tuple[str, int, float, bool]]()
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer) and name in layer.r:
            held = layer.lora_A[name].weight if name in layer.lora_A else layer.lora_embedding_A[name]
            rank = held.shape[0]
            found.append((path, rank, layer.scaling[name] * rank, rank == layer.r[name]))
    if not all(as_stated for *_, as_stated in found):
        longest = sorted(found, key=lambda one: len(one[0]), reverse=True)  # peft uses the first that ends a name
        settings.rank_pattern = {path: rank for path, rank, *_ in longest}
        settings.alpha_pattern = {path: alpha for path, _, alpha, _ in longest}
        settings.use_rslora = False  # alpha_pattern preserves the scale with the current ranks
    return settings
