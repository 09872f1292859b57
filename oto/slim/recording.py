"""The last resort: the recorded run of the example, with thinner tensors and the sizes to match."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from oto.axes.registry import known
from oto.groups import Kept, Partition
from oto.slim.graph import emit_graph
from oto.slim.reference import Reference
from oto.slim.verify import Check
from oto.slim.wide import double_input, throughout
from oto.trace.record import Recording, record_data
from oto.trace.replay import difference, replayed

RECORDED = (
    "recorded at the example's shapes and values: other shapes, and other paths through branches on values,"
    " are not in it"
)


def emit_recording(model: nn.Module, dummy_input: Any, partition: Partition, kept: Kept) -> fx.GraphModule:
    """Build the slim model of the calls that ``model`` makes on the example.

    Raises:
        EmitterError: A call is nothing that a graph can hold.
    """
    with throughout(model):
        run = replayed(model, dummy_input, known, partition.found.graph.how)
    return emit_graph(run, partition, kept)


def check_recording(
    reference: Reference, slim: nn.Module, partition: Partition, kept: Kept, notes: list[str]
) -> list[Check]:
    """Compare a recording with the zeroed full model, on the example and on random inputs that take the same path.

    Numbers that left torch were read in the model's dtype. Where float64 shows that, another recording is compared in
    float64, which is made in it.
    """
    full, dummy_input = reference.model, reference.dummy_input

    def path(given: Any) -> Recording:
        with throughout(full):
            return record_data(full, given, known)

    example = path(dummy_input)

    def lacks(given: Any) -> str | None:
        try:
            return difference(example, path(given))
        except Exception:  # inputs may have to fit together
            return "the model does not take it"

    def recorded() -> nn.Module:
        return emit_recording(full, double_input(dummy_input), partition, kept)

    return reference.check(slim, notes=notes, lacks=lacks, in_float64=recorded)
