"""Check that the model still has the parameters that its optimizer trains.

If a layer is replaced after the optimizer was made, the new layer is never trained, and the optimizer zeroes parameters
that are no longer part of the model. Only names and identities are compared, so a check takes less than a millisecond.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from oto.errors import ModelChangedError, NoGradientWarning, UntrainedWarning, some, users_level
from oto.shards import is_sharded, reshard

CHECK_STEPS = 8
"""The model is checked once in this many steps, and at the first and last step of every period."""


_UNTRAINED = "the optimizer trains and zeroes what the model does not use, and what it uses is not trained"


@dataclass(frozen=True)
class Followed:
    """A model, and its parameters at the time of the last check.

    Attributes:
        model: A weak reference to the model.
        trained: For each name of a trained parameter in the model, the name that the optimizer uses.
        names: The names of all parameters of the model.
        frozen: The names of those that were frozen.
        warned: Whether the parameters had no gradients at the last check, so that the user is not warned again.
    """

    model: weakref.ref[nn.Module]
    trained: Mapping[str, str]
    names: frozenset[str]
    frozen: frozenset[str]
    warned: bool = False

    @classmethod
    def of(cls, model: nn.Module, parameters: Mapping[str, Tensor]) -> Followed:
        """Start to follow a model.

        Args:
            parameters: The trained parameters, by name.
        """
        own = {p: name for name, p in parameters.items()}
        found = dict(model.named_parameters(remove_duplicate=False))
        trained = {name: own[p] for name, p in found.items() if p in own}
        frozen = frozenset(name for name, p in found.items() if not p.requires_grad)
        return cls(weakref.ref(model), trained, frozenset(found), frozen)

    def renamed(self, names: Mapping[str, str]) -> Followed:
        """The same with new names of some parameters in the optimizer."""
        return replace(self, trained={name: names.get(own, own) for name, own in self.trained.items()})

    def look(self, parameters: Mapping[str, Tensor], needed: Container[str], pruning: bool) -> Followed:
        """Compare the model with the trained parameters; warn of missing gradients, and of parameters not trained.

        Args:
            parameters: The trained parameters, by name.
            needed: Names of parameters whose entries are zeroed.
            pruning: Whether pruning is still to come or under way.

        Returns:
            The state to compare with at the next check, so that nothing is reported twice.

        Raises:
            ModelChangedError: A trained parameter was replaced, or one whose entries are zeroed is gone.
        """
        model = self.model()
        if model is None:
            return self
        reshard(model)
        kind, now = type(model).__name__, dict(model.named_parameters(remove_duplicate=False))
        self._require_same(kind, now, parameters, needed)
        without = all(p.grad is None for p in parameters.values())
        if without and not self.warned:
            warnings.warn(
                f"no parameter of the {kind} that the optimizer trains has a gradient\n"
                "  effect  its step changes nothing but what is being pruned\n"
                "  to fix  loss.backward() before optimizer.step(), through the model itself: a copy of it, or"
                " parameters that were listed before oto.shrink(), are others",
                NoGradientWarning,
                stacklevel=users_level(),
            )
        held = set(parameters.values())
        added = [name for name, p in now.items() if name not in self.names and p.requires_grad and p not in held]
        if added:
            warnings.warn(
                f"{some(added)} of the {kind} came after the optimizer was made\n"
                "  effect  this optimizer does not train it\n"
                "  to fix  optimizer.add_param_group({'params': [...]}), or nothing if another optimizer does",
                UntrainedWarning,
                stacklevel=users_level(),
            )
        new = [name for name, p in now.items() if name in needed and not p.requires_grad and name not in self.frozen]
        if new and pruning:
            warnings.warn(
                f"{some(new)} of the {kind} was frozen after the optimizer was made\n"
                "  effect  entries of it may still be brought to zero\n"
                "  to fix  freeze before OTO(...), which then leaves it whole; or nothing if it may be zeroed",
                UntrainedWarning,
                stacklevel=users_level(),
            )
        return replace(self, names=self.names.union(added), frozen=self.frozen.union(new), warned=without)

    def _require_same(
        self, kind: str, now: Mapping[str, Tensor], parameters: Mapping[str, Tensor], needed: Container[str]
    ) -> None:
        replaced = [n for n, own in self.trained.items() if n in now and now[n] is not parameters.get(own)]
        gone = [name for name in self.trained if name not in now and name in needed]
        if not (replaced or gone):
            return
        if any(is_sharded(now[name]) and not is_sharded(parameters[self.trained[name]]) for name in replaced):
            raise ModelChangedError(
                f"{some(replaced)} of the {kind} was spread over processes after the optimizer was made\n"
                f"  effect  {_UNTRAINED}\n"
                "  to fix  OTO(...), then fully_shard or parallelize_module, then the optimizer: oto.hesso(...)"
            )
        there = set(now.values())
        if not replaced and all(parameters.get(self.trained[name]) in there for name in gone):
            said = "has another name than", "what is zeroed is not found by its name, so no slim model could be made"
        elif replaced:
            said = "is another tensor than", _UNTRAINED
        else:
            said = "is no parameter any more, as it was", _UNTRAINED
        raise ModelChangedError(
            f"{some(replaced or gone)} of the {kind} {said[0]} when the optimizer was made\n"
            f"  effect  {said[1]}\n"
            "  to fix  change the model first (new layers, adapters, parametrizations, load_state_dict with"
            " assign=True), then OTO(...) and a new optimizer"
        )
