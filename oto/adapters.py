"""Models with adapters of ``peft``: how they are made again, and how slim adapters part from their slim base.

    oto = OTO(peft_model, example, prune_frozen=True, layout="uniform")     # uniform: the config states the sizes
    optimizer = oto.lhspg(variant="adamw", lr=1e-3, target_params=0.6, total_steps=1000)
    ...                                                                     # train
    slim = slim_adapters(oto.construct_subnet().model)
    slim.save_pretrained("adapters")                                        # the adapters alone
    slim.unload().save_pretrained("slim")                                   # the base, last: it takes them off

``PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("slim"), "adapters")`` is the slim model, without
``oto``.

This file alone knows classes of peft, which is not imported before it is used.
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
"""The kind of adapters that are told from their base."""


def _adapted(model: Any) -> Any:
    """peft, if it made the model."""
    peft: Any = sys.modules.get("peft")  # a model of peft has imported it
    return peft if peft is not None and isinstance(model, peft.PeftModel) else None


def makers_of_adapted(model: Any) -> Iterator[Maker]:
    """What may have made a model of peft: it makes the base of a config, and puts the one adapter on."""
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
    """The slim model as peft has it: slim adapters, on a slim base whose layers know nothing of them.

    Its ``save_pretrained`` writes the adapters alone, which load onto the same base by ``PeftModel.from_pretrained``;
    ``merge_and_unload()`` gives the merged model.

    Args:
        model: The model of a subnet whose full model was a ``PeftModel`` with one adapter; it is not changed.
        base: A slim base of the same sizes, to put the adapters on; by default a copy of the one that they are on.

    Returns:
        A ``PeftModel``. Where ranks differ from each other, its config states each (``rank_pattern``).

    Raises:
        OptionError: The model is none of peft, has several adapters, or those of a kind that cannot be told apart; or
            ``base`` has layers of other sizes.
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
        warnings.simplefilter("ignore")  # that tied weights may be adapted, or the base was: told when they were
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
    """Refuse a model that has layers of peft, but not the ``PeftModel`` around them.

    Raises:
        OptionError: It says which model to take.
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
    """The one adapter of a model, and its settings."""
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
    """The settings with the ranks that adapters have now; the base is taken as it is, whatever they began with."""
    settings = copy.deepcopy(settings)
    settings.init_lora_weights = True
    peft, found = sys.modules["peft"], list[tuple[str, int, float, bool]]()
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer) and name in layer.r:
            held = layer.lora_A[name].weight if name in layer.lora_A else layer.lora_embedding_A[name]
            rank = held.shape[0]
            found.append((path, rank, layer.scaling[name] * rank, rank == layer.r[name]))
    if not all(as_stated for *_, as_stated in found):
        longest = sorted(found, key=lambda one: len(one[0]), reverse=True)  # the first that ends a name counts
        settings.rank_pattern = {path: rank for path, rank, *_ in longest}
        settings.alpha_pattern = {path: alpha for path, _, alpha, _ in longest}
        settings.use_rslora = False  # the scale is what it was, by the ranks of now
    return settings
