"""The recorded calls, run on thinner tensors: proof for models that no graph can be exported of.

The model is recorded on its real example, so this follows the example's path and is of no use for any other input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from oto.axes.registry import known
from oto.groups import partition
from oto.slim.graph.replay import emit_recording
from oto.slim.proof.float64 import throughout
from oto.slim.proof.run import run
from oto.slim.pruned_shapes import read_zeros
from oto.trace.record import record_data


def replay(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    """What the slim model would give on the example, by the zeros that ``model`` (in float64) holds."""
    with throughout(model):
        found = partition(record_data(model, inputs, known).graph)
    return run(emit_recording(model, inputs, found, read_zeros(found.groups, model)), inputs)
