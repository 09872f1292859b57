"""What ``oto/_torch.py`` borrows from torch's inside must do what it did; a release that moves it fails here first."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict, deque, namedtuple

import pytest
import torch
from torch.utils import _pytree as pytree

from oto import _torch


def test_a_dispatch_mode_sees_composite_operators_whole_in_inference_mode():
    seen = []

    class Watch(_torch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(op)
            return op(*args, **(kwargs or {}))

    x, w = torch.randn(2, 3), torch.randn(4, 3)
    with torch.inference_mode(), Watch():
        torch.nn.functional.linear(x, w)
    assert seen == [torch.ops.aten.linear.default]


def test_function_modes_see_nothing_where_they_are_disabled():
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.randn(2)
    with Watch():
        with _torch.DisableTorchFunction():
            assert x.shape == (2,)
        assert not seen
        assert x.shape == (2,)
    assert seen


def test_fake_tensors_know_shape_and_device_and_take_real_ones_along():
    with _torch.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(torch.randn(2, 3))
        out = fake @ torch.randn(3, 4)
    assert isinstance(out, _torch.FakeTensor) and out.shape == (2, 4) and out.device.type == "cpu"


def test_pytrees_go_through_containers_and_keep_their_kind():
    tree = {"a": [1, (2.0, None)], "b": torch.ones(1)}
    leaves, spec = _torch.tree_flatten(tree)
    assert len(leaves) == len(_torch.tree_leaves(tree))
    assert _torch.tree_unflatten(leaves, spec)["a"] == [1, (2.0, None)]
    assert _torch.tree_map_only(int, lambda n: n + 1, tree)["a"][0] == 2
    assert _torch.tree_map(lambda x: x, tree)["a"] == tree["a"]


def test_containers_of_all_kinds_are_gone_through_as_torch_does():
    point = namedtuple("point", "x y")
    tree = [OrderedDict(b=1, a=point(2, [3])), deque([4]), {"k": (5, {6}), "n": None}, torch.Size([7]), slice(8, 9)]
    assert _torch.tree_leaves(tree) == pytree.tree_leaves(tree)
    found = _torch.tree_map_only(int, lambda n: -n, tree)
    assert found == pytree.tree_map_only(int, lambda n: -n, tree) and type(found[0]["a"]) is point


def test_a_fake_tensor_is_what_the_mode_would_make():
    with torch.inference_mode(), _torch.FakeTensorMode() as mode:
        made = _torch.fake_empty(mode, (2, 3), (1, 2), torch.float16, torch.device("cpu"))
        other = torch.empty_strided((2, 3), (1, 2), dtype=torch.float16)
        for t in (made, _torch.fake_empty(mode, (2, 3), None, torch.float16, torch.device("cpu"))):
            assert type(t) is type(other) and (t.shape, t.dtype, t.device) == (other.shape, other.dtype, other.device)
        assert made.stride() == (1, 2) and (made + other).shape == (2, 3) and made.is_inference()


def test_the_example_behind_a_symbolic_size():
    class Double(torch.nn.Module):
        def forward(self, x):
            return x * 2

    free = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(Double(), (torch.ones(5, 2),), dynamic_shapes=free, strict=False)
    (node,) = (n for n in program.graph.nodes if n.op == "placeholder")
    batch, width = node.meta["val"].shape
    assert isinstance(batch, torch.SymInt) and _torch.example_size(batch) == 5 and _torch.example_size(width) == 2


def test_a_size_that_tracing_settled_on_is_not_free():
    class Settled(torch.nn.Module):
        def forward(self, x, y):
            return x.view(5, -1) * 2, y * 2

    free = ({0: torch.export.Dim.AUTO}, {0: torch.export.Dim.AUTO})
    given = (torch.ones(5, 2), torch.ones(5, 2))
    program = torch.export.export(Settled(), given, dynamic_shapes=free, strict=False)
    x, y = (n.meta["val"].shape[0] for n in program.graph.nodes if n.op == "placeholder")
    assert not _torch.is_free(5) and not _torch.is_free(x) and _torch.is_free(y)


def test_a_fake_tensor_that_fails_is_quiet(caplog, capfd):
    torch._logging.set_logs()  # torch's handlers, as a user has them
    with _torch.quiet(), _torch.FakeTensorMode() as mode, pytest.raises(RuntimeError):
        mode.from_tensor(torch.ones(2)) + mode.from_tensor(torch.ones(3))
    assert "Traceback" not in capfd.readouterr().err and not caplog.records


def test_wrappers_are_taken_off():
    model = torch.nn.Linear(2, 2)
    assert _torch.unwrapped(torch.compile(model, backend="eager")) is model
    assert _torch.unwrapped(torch.nn.DataParallel(model)) is model and _torch.unwrapped(model) is model


def test_a_dispatch_mode_is_given_torch_cond_whole():
    seen = []

    class Watch(_torch.TorchDispatchMode):
        supports_higher_order_operators = True

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(op)
            return op(*args, **(kwargs or {}))

    x = torch.ones(2)
    with torch.inference_mode(), Watch():
        torch.cond(x.sum() > 0, lambda t: t * 2, lambda t: t + 1, (x,))
    assert seen[-1] is torch.ops.higher_order.cond and isinstance(seen[-1], _torch.HigherOrderOperator)


def _sized(forward, *shapes):
    """A program whose every size is free."""
    model = torch.nn.Module()
    model.forward = forward
    given = tuple(torch.ones(shape) for shape in shapes)
    free = tuple(dict.fromkeys(range(x.ndim), torch.export.Dim.AUTO) for x in given)
    return torch.export.export(model, given, dynamic_shapes=free, strict=False)


def test_sizes_are_expressions_and_conditions_on_them_are_python():
    program = _sized(lambda x: x.view(-1, 3) if x.shape[0] % 3 == 0 else x, (6, 4))
    (x,) = (n.meta["val"] for n in program.graph.nodes if n.op == "placeholder")
    name = _torch.expression(x.shape[0])
    assert name.isidentifier() and _torch.substituted(f"2*{name} + 1", {name: 4}) == 9
    assert _torch.count_conditions(x.shape[0]) >= 1
    text = next(t for t in _torch.guards_of(program) if t.endswith("% 3) == 0"))
    holds = eval(f"lambda L: {text}", {"__builtins__": {}, **_torch.SIZE_FUNCTIONS})
    assert holds({"x": torch.ones(9, 4)}) and not holds({"x": torch.ones(8, 4)})


def test_how_a_graph_nests_its_inputs_can_be_kept_and_put_back():
    module = _sized(lambda x: {"y": [x + 1]}, (2, 3)).module()
    state, graph = _torch.codegen_state(module.graph), torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.neg, (x,)),))
    assert _torch.codegen_state(graph) is None
    _torch.nested_codegen(graph, pickle.loads(pickle.dumps(state)))
    assert torch.equal(torch.fx.GraphModule({}, graph)(torch.ones(2, 3))["y"][0], -torch.ones(2, 3))


def test_the_lines_that_the_compiler_follows_are_known():
    seen = []

    @_torch.constant
    def look():
        seen.extend(_torch.followed_lines())
        return 2

    def inner(x):
        return x * look()

    def outer(x):
        return inner(x) + 1

    assert torch.compile(outer, backend="eager", fullgraph=True)(torch.ones(1)) == 3
    names = [name for file, line, name in seen if file == __file__ and line > 0]
    assert names == ["outer", "inner"]


def test_a_constant_is_marked_as_torch_does_it():
    assert vars(_torch.constant(lambda: 1)) == vars(torch.compiler.assume_constant_result(lambda: 1)) != {}


@pytest.mark.zoo  # the C++ compiler takes its time
def test_a_compiled_package_is_called_as_the_model(tmp_path):
    packed = io.BytesIO()
    _torch.compile_package(_sized(lambda x: x * 2, (2, 3)), packed)
    (tmp_path / "model.pt2").write_bytes(packed.getvalue())
    x = torch.randn(5, 4)
    assert torch.equal(_torch.load_package(str(tmp_path / "model.pt2"))(x), x * 2)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_wrappers_of_a_model_are_found(tmp_path):
    from torch import distributed as dist

    model = torch.nn.Linear(2, 2)
    assert _torch.data_parallel_around(model) == []
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        one, two = (torch.nn.parallel.DistributedDataParallel(m) for m in (model, torch.nn.Sequential(model)))
        other = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        found = _torch.data_parallel_around(model)
        assert {id(wrapper) for wrapper in found} == {id(one), id(two)} and other not in found
    finally:
        dist.destroy_process_group()


def test_the_code_of_an_operator_that_is_written_in_python():
    @torch.library.custom_op("oto_tests::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    code = _torch.python_code(torch.ops.oto_tests.twice.default)
    assert code is not None and torch.equal(code(torch.ones(2)), torch.full((2,), 2.0))
    assert _torch.python_code(torch.ops.aten.add.Tensor) is None


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_modules_that_were_sharded_are_of_their_own_class_for_a_while():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        plain, sharded, parallel = (torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()) for _ in range(3))
        seen = []
        for model in (plain, sharded, parallel):
            model[1].register_forward_hook(lambda *_: seen.append(1))
        fully_shard(sharded[0])
        fully_shard(sharded)
        parallelize_module(parallel, init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()})
        for model in (sharded, parallel):
            before = [
                (type(m), {key: dict(x) if isinstance(x, dict) else x for key, x in vars(m).items()})
                for m in model.modules()
            ]
            with _torch.undistributed(model):
                for own, other in zip(model.modules(), plain.modules(), strict=True):
                    assert type(own) is type(other) and vars(own).keys() == vars(other).keys()
                    hooks = {key: len(x) for key, x in vars(own).items() if key.endswith("_hooks") and x}
                    assert hooks == {key: len(x) for key, x in vars(other).items() if key.endswith("_hooks") and x}
            assert before == [
                (type(m), {key: dict(x) if isinstance(x, dict) else x for key, x in vars(m).items()})
                for m in model.modules()
            ]
        assert isinstance(sharded, FSDPModule)
        sharded(torch.ones(1, 2)).sum().backward()
        assert seen
        other = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
        fully_shard(other)
        sharded.__class__, sharded.__dict__ = type(other), other.__dict__
        _torch.same_sharding(sharded, other)
        sharded.unshard()
        assert not any(hasattr(p, "full_tensor") for p in other.parameters())
        other.reshard()
        assert all(hasattr(p, "full_tensor") for p in sharded.parameters())
        _torch.same_sharding(other, plain)  # what none has sharded is not
        with pytest.raises(AssertionError):
            other.unshard()
    finally:
        torch.distributed.destroy_process_group()


def test_memory_has_a_key_that_views_share_and_no_other_gets():
    x = torch.zeros(8)
    key, kept = _torch.memory_of(x)
    assert (
        _torch.memory_of(x[2:].view(2, 3))[0]
        == key
        == _torch.memory_of(x.detach())[0]
        != _torch.memory_of(x.clone())[0]
    )
    del x
    assert all(_torch.memory_of(torch.zeros(8))[0] != key for _ in range(100))
    assert kept is not None
    sparse = torch.eye(3).to_sparse()
    assert _torch.memory_of(sparse) == (id(sparse), sparse)
