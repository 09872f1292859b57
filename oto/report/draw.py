"""Draw the graph: one color per node group, gray for what stays whole, repeated blocks drawn once.

Three things keep the drawing of a deep network readable. Calls that only move entries (views, transposes, casts) are
left out, and their edges are joined. Of neighboring blocks with the same calls in the same order (``layer.0`` …
``layer.11``) only the first is drawn; the others share one box. Calls are framed by the block that they belong to and
by the segments that they would be removed with; a segment that stays has a gray frame.
"""

from __future__ import annotations

import colorsys
import re
import shutil
import warnings
import webbrowser
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import networkx as nx

from oto.errors import MissingExtraError, NoGraphvizWarning
from oto.groups import NodeGroup, Partition
from oto.groups.cost import macs_by_node

FORMATS = ("svg", "pdf", "png")
GRAY = "#e4e4e4"
WHITE = "#ffffff"
# calls that compute nothing, which are not drawn
QUIET = {
    "view",
    "_unsafe_view",
    "reshape",
    "transpose",
    "permute",
    "t",
    "contiguous",
    "clone",
    "expand",
    "expand_as",
    "unsqueeze",
    "squeeze",
    "flatten",
    "unflatten",
    "dropout",
    "detach",
    "alias",
    "to",
    "_to_copy",
    "type_as",
    "slice",
    "select",
    "unbind",
    "split",
    "split_with_sizes",
    "chunk",
    "movedim",
    "swapaxes",
    "view_as",
    "reshape_as",
    "mT",
    "numpy_T",
    "feature_dropout",
    "lift_fresh_copy",
    "write_through",
}


def draw(
    partition: Partition,
    groups: Sequence[NodeGroup],
    out_dir: Path,
    title: str,
    *,
    view: bool = False,
    vertical: bool = True,
    by_node_groups: bool = True,
    display_params: bool = False,
    display_flops: bool = False,
) -> list[Path]:
    """Write the drawing to ``out_dir`` as DOT, and as SVG, PDF and PNG if graphviz is installed.

    Raises:
        MissingExtraError: pydot is not installed.
    """
    dot = to_dot(
        partition,
        groups,
        title,
        vertical=vertical,
        by_node_groups=by_node_groups,
        display_params=display_params,
        display_flops=display_flops,
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    written = [out_dir / f"{title}.dot"]
    dot.write(str(written[0]), format="raw")
    if shutil.which("dot") is None:
        warnings.warn(
            f"graphviz is not installed, so the drawing is there as {written[0]} only\n"
            "  to fix  install it (apt install graphviz, brew install graphviz, conda install graphviz) and call\n"
            f"          visualize again; or run: dot -Tsvg {written[0]} -o {title}.svg",
            NoGraphvizWarning,
            stacklevel=3,
        )
    else:
        for kind in FORMATS:
            written.append(out_dir / f"{title}.{kind}")
            dot.write(str(written[-1]), format=kind)
    if view and len(written) > 1:
        webbrowser.open(written[1].resolve().as_uri())
    return written


def to_dot(
    partition: Partition,
    groups: Sequence[NodeGroup],
    title: str,
    *,
    vertical: bool = True,
    by_node_groups: bool = True,
    display_params: bool = False,
    display_flops: bool = False,
) -> Any:
    """The drawing as a ``pydot.Dot``.

    Raises:
        MissingExtraError: pydot is not installed.
    """
    try:
        import pydot
    except ImportError as failure:
        raise MissingExtraError(
            "drawing needs pydot, which is not installed\n  to fix  pip install 'oto[viz]'"
        ) from failure
    flow = partition.graph
    colors = palette([g.name for g in groups if g.prunable]) if by_node_groups else {}
    prunable = {g.name for g in groups if g.prunable}
    macs = macs_by_node(partition) if display_flops else {}
    repeats = repeated_blocks(flow)
    box = {node: _box(node, data, repeats) for node, data in flow.nodes(data=True) if _drawn(data)}
    picture = _canvas(_title(title, groups, by_node_groups), vertical)
    frames: dict[str, Any] = {"": picture}
    blocks, around = _blocks(flow), _segments(partition)
    for node, name in box.items():
        if node == name:
            data = flow.nodes[node]
            block = _block(data["module"], blocks)
            label = _label(node, data, flow, display_params, macs, data["module"].removeprefix(block).lstrip("."))
            frame = _frame(block, frames, pydot)
            for segment in around.get(node, ()):
                frame = _dashed(segment, segment in prunable, frame, frames, pydot)
            frame.add_node(
                pydot.Node(
                    _quoted(name),
                    label=label,
                    tooltip=_tooltip(data, prunable),
                    **_style(data, prunable, colors, by_node_groups),
                )
            )
    for name in dict.fromkeys(name for node, name in box.items() if node != name):
        block, others = repeats[name]
        inside = {g for n, of in box.items() if of == name for g in flow.nodes[n]["groups"]}
        free = len(inside & prunable)
        label = _escaped(f"{_span(others)}\n{len(others)} more like {block}\n{free} prunable groups inside")
        picture.add_node(pydot.Node(_quoted(name), label=label, shape="box3d", fillcolor=WHITE if free else GRAY))
    line = {*pairwise(dict.fromkeys(box[n] for n in nx.dag_longest_path(flow) if n in box))}
    for a, b in _edges(flow, box):
        # draw the longest path straight, so that a deep network is a column
        picture.add_edge(pydot.Edge(_quoted(a), _quoted(b), weight="100" if (a, b) in line else "1"))
    return picture


def _canvas(title: str, vertical: bool) -> Any:
    """An empty drawing with the styles of boxes and arrows."""
    import pydot

    picture = pydot.Dot(
        graph_type="digraph",
        rankdir="TB" if vertical else "LR",
        labelloc="t",
        fontname="Helvetica",
        fontsize="16",
        label=_escaped(title),
        nodesep="0.2",
        ranksep="0.25",
        compound="true",
    )
    picture.set_node_defaults(
        shape="box",
        style="filled",
        fontname="Helvetica",
        fontsize="11",
        color="#555555",
        fillcolor=WHITE,
        margin="0.12,0.05",
        height="0.3",
    )
    picture.set_edge_defaults(color="#777777", arrowsize="0.6")
    return picture


def palette(names: Sequence[str]) -> dict[str, str]:
    """A light color for each name; neighbors have clearly different colors.

    >>> palette(["a", "b"])
    {'a': '#f5b8b8', 'b': '#b8c9f5'}
    """
    colors = {}
    for i, name in enumerate(names):
        hue = i * 0.6180339887 % 1  # multiples of the golden ratio spread any number of hues
        rgb = colorsys.hls_to_rgb(hue, (0.84, 0.76, 0.9)[i // 12 % 3], 0.75)
        colors[name] = "#" + "".join(f"{round(255 * c):02x}" for c in rgb)
    return colors


def repeated_blocks(flow: nx.DiGraph) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Find runs of neighboring numbered blocks that make the same calls.

    Returns:
        For the name of the box that stands for all blocks of a run except the first: the first block, and the others.
    """
    calls: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {}
    for _, data in flow.nodes(data=True):
        if data["kind"] != "operator":
            continue
        parts = data["module"].split(".")
        for i, part in enumerate(parts, 1):
            if part.isdigit():
                inner = ".".join(parts[i:])
                calls.setdefault(".".join(parts[:i]), []).append((data["op"], inner, data["shape"]))
    families: dict[str, list[int]] = {}
    for block in calls:
        parent, _, number = block.rpartition(".")
        families.setdefault(parent, []).append(int(number))
    boxes: dict[str, tuple[str, tuple[str, ...]]] = {}
    for parent, numbers in families.items():

        def name(i: int, parent: str = parent) -> str:
            return f"{parent}.{i}" if parent else str(i)

        runs: list[list[int]] = []
        for i in sorted(numbers):
            if runs and runs[-1][-1] == i - 1 and calls[name(i)] == calls[name(runs[-1][0])]:
                runs[-1].append(i)
            else:
                runs.append([i])
        for first, *others in runs:
            # a single call takes no more space than the box that would replace it
            if others and len(calls[name(first)]) > 1:
                box = f"like {name(first)}"
                boxes[box] = (name(first), tuple(map(name, others)))
    return boxes


def _drawn(data: Mapping[str, Any]) -> bool:
    return data["kind"] in ("input", "output") or (data["kind"] == "operator" and _short(data["op"]) not in QUIET)


def _box(node: str, data: Mapping[str, Any], repeats: Mapping[str, tuple[str, tuple[str, ...]]]) -> str:
    """The box of a node: its own, or that of the outermost run of repeated blocks around it."""
    boxes = [
        (len(block), name)
        for name, (_, others) in repeats.items()
        for block in others
        if f"{data['module']}.".startswith(f"{block}.")
    ]
    return min(boxes)[1] if boxes else node


def _edges(flow: nx.DiGraph, box: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Edges between boxes; edges through nodes that are not drawn are joined."""
    sources: dict[str, dict[str, None]] = {}
    edges: dict[tuple[str, str], None] = {}
    for node in flow:  # calls come after what they read
        given = dict.fromkeys(s for p in flow.predecessors(node) for s in sources.get(p, {}))
        if node not in box:
            sources[node] = given
            continue
        edges.update(((a, box[node]), None) for a in given if a != box[node])
        sources[node] = {box[node]: None}
    return edges


def _blocks(flow: nx.DiGraph) -> set[str]:
    """Numbered modules with named modules inside, such as ``layer1.0``."""
    blocks: set[str] = set()
    for _, data in flow.nodes(data=True):
        parts = data["module"].split(".") if data["kind"] == "operator" else []
        blocks.update(
            ".".join(parts[:i])
            for i, (part, inner) in enumerate(pairwise(parts), 1)
            if part.isdigit() and not inner.isdigit()
        )
    return blocks


def _block(module: str, blocks: set[str]) -> str:
    """The outermost block that a module is in."""
    parts = module.split(".")
    return next((p for i in range(1, len(parts) + 1) if (p := ".".join(parts[:i])) in blocks), "")


def _segments(partition: Partition) -> dict[str, list[str]]:
    """For each node, the segments that contain it, outermost first."""
    found: dict[str, list[str]] = {}
    for segment in sorted(partition.segments, key=lambda segment: -len(segment.body)):
        for index in segment.body:
            found.setdefault(f"node-{index}", []).append(segment.name)
    return found


def _dashed(name: str, free: bool, inside: Any, frames: dict[str, Any], pydot: Any) -> Any:
    """The cluster of a segment, inside the cluster of its block or of the segment around it."""
    key = f"segment {name} in {inside.get_name()}"
    if key not in frames:
        frames[key] = pydot.Cluster(
            re.sub(r"\W", "_", key),
            label=_escaped(f"{name} may go" if free else f"{name} stays"),
            color="#5a8f5a" if free else "#bbbbbb",
            style="dashed",
            fontname="Helvetica",
            fontsize="10",
            labeljust="l",
        )
        inside.add_subgraph(frames[key])
    return frames[key]


def _frame(path: str, frames: dict[str, Any], pydot: Any) -> Any:
    """The cluster of a block."""
    if path not in frames:
        frames[path] = pydot.Cluster(
            re.sub(r"\W", "_", path),
            label=_escaped(path),
            color="#bbbbbb",
            style="rounded",
            fontname="Helvetica",
            fontsize="11",
            fontcolor="#555555",
            labeljust="l",
        )
        frames[""].add_subgraph(frames[path])
    return frames[path]


def _style(data: Mapping[str, Any], prunable: set[str], colors: Mapping[str, str], colored: bool) -> dict[str, Any]:
    own = [g for g in data["groups"] if g in prunable]
    if data["kind"] in ("input", "output"):
        return {"shape": "ellipse", "fillcolor": WHITE}
    if not own:
        return {"fillcolor": GRAY}
    if not colored:
        return {"fillcolor": WHITE}
    shades = [colors[g] for g in own[:8]]
    return {"fillcolor": f'"{":".join(shades)}"', "style": "striped" if len(shades) > 1 else "filled"}


def _label(
    node: str, data: Mapping[str, Any], flow: nx.DiGraph, display_params: bool, macs: Mapping[int, int], place: str
) -> str:
    size = "×".join(map(str, data["shape"]))
    if data["kind"] != "operator":
        return _escaped(f"{node}\n{size}")
    lines = [f"{_short(data['op'])}   {place}".rstrip(), f"{size}   {node}"]
    if display_params:
        held = [(p, flow.nodes[p]["shape"]) for p in flow.predecessors(node) if flow.nodes[p]["kind"] == "parameter"]
        names = [p.removeprefix("parameter ").rpartition(".")[2] for p, _ in held]
        lines += [f"{n} {'×'.join(map(str, s))} ({prod(s):,})" for n, (_, s) in zip(names, held, strict=True)]
    index = int(node.removeprefix("node-"))
    if index in macs:
        lines.append(f"{metric(2 * macs[index])}FLOPs")
    return _escaped("\n".join(lines))


def _tooltip(data: Mapping[str, Any], prunable: set[str]) -> str:
    groups = ", ".join(g if g in prunable else f"({g})" for g in data["groups"])
    return _escaped("\n".join(filter(None, [data.get("module"), data.get("source"), groups])) or " ")


def _title(title: str, groups: Sequence[NodeGroup], colored: bool) -> str:
    free = [g for g in groups if g.prunable]
    key = "one color each, stripes where a call carries several" if colored else "white"
    return (
        f"{title}: {len(free)} of {len(groups)} node groups prunable,"
        f" {sum(g.size for g in free):,} zero-invariant groups\n{key}; gray stays whole"
    )


def _span(blocks: Sequence[str]) -> str:
    return blocks[0] if len(blocks) == 1 else f"{blocks[0]} … {blocks[-1].rpartition('.')[2]}"


def metric(n: int) -> str:
    """
    >>> metric(4_089_184_256)
    '4.09 G'
    """
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n} "


def _short(op: str) -> str:
    """
    >>> _short("aten.conv2d.default")
    'conv2d'
    """
    parts = op.split(".")
    return parts[1] if len(parts) > 1 else op


def _quoted(name: str) -> str:
    return '"' + name.replace('"', "'") + '"'


def _escaped(text: str) -> str:
    return _quoted(text.replace("\\", "/").replace("\n", "\\n"))
