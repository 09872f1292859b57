"""Half of all ZIGs removed at random, in float64: the slim model computes what the zeroed one does."""

from __future__ import annotations

import pytest
import torch

from oto import OTO
from oto._torch import tree_map_only
from oto.errors import EmitterError, VerificationError
from oto.slim.verify import random_like, relative_error, run

from .models import ZOO, lively

EVERY_RUN = [
    "resnet18",
    "densenet121",
    "resnext50_32x4d",
    "shufflenet_v2_x1_0",
    "convnext_tiny",
    "swin_t",
    "bert",
    "llama",
    "t5",
]
# float64, sums of at most some ten thousand terms in another order
TOLERANCE = 1e-10


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in EVERY_RUN else pytest.mark.zoo) for n in ZOO])
def test_half_of_all_groups_removed(name):
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    model = lively(model, inputs).double()
    inputs = tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    oto = OTO(model, inputs)
    dense = sum(p.numel() for p in model.parameters())
    assert oto.compute_num_params() == dense
    oto.random_set_zero_groups(0.5, seed=3)
    zeroed = run(model, inputs)
    # a model whose output hardly depends on its input would hide a mistake
    assert relative_error(zeroed, run(model, random_like(inputs, 9))) > 1e-5
    reached = {"module": None, "graph": None}
    for emitter in reached:
        try:
            subnet = oto.construct_subnet(emitter=emitter)
        except (EmitterError, VerificationError) as failure:
            assert emitter == "module", failure  # the graph is always possible
            continue
        assert subnet.max_error <= TOLERANCE
        assert relative_error(zeroed, run(subnet.model, inputs)) <= TOLERANCE
        reached[emitter] = sum(p.numel() for p in subnet.model.parameters())
        assert subnet.cost_before.params == dense
        assert subnet.cost_after.params < 0.75 * dense
        if emitter == "module":
            assert reached[emitter] == subnet.cost_after.params
    assert reached["graph"] is not None
