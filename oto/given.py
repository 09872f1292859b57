"""Make models and inputs, and read checkpoints, that are named on a command line.

| a model                      | is                                                                                    |
|------------------------------|---------------------------------------------------------------------------------------|
| ``torchvision:NAME``         | ``torchvision.models.get_model(NAME)``                                                |
| ``timm:NAME``                | ``timm.create_model(NAME)``                                                           |
| ``hf:PATH``                  | a folder or a name on the Hub, for transformers; the config names the class           |
| ``package.module:NAME``      | a module, or a function or class that makes one; it may be in the working folder      |

| an input                     | is                                                                                    |
|------------------------------|---------------------------------------------------------------------------------------|
| ``1x3x224x224``              | random floats of that shape                                                           |
| ``1x128:int64``              | another dtype; for integers, random zeros and ones                                    |
| ``1x128:int64:30522``        | random integers from 0 to 30521                                                       |
| ``mask=1x128:bool``          | the argument ``mask`` of ``forward``; booleans are all true                           |

Files are read without unpickling objects that could run code: checkpoints with ``weights_only=True``, and code from a
model's folder is never run.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from oto.errors import GivenError, MissingExtraError, first_line, out_of_memory, reraise_out_of_memory, some

HOW_TO_NAME = "torchvision:NAME, timm:NAME, hf:PATH, or package.module:function"


def named_model(name: str, pretrained: bool = False) -> nn.Module:
    """Make the model of a name, in eval mode.

    Args:
        name: See the table above.
        pretrained: Use the library's pretrained weights. A model from ``hf:`` has those of its folder anyway.

    Raises:
        GivenError: There is no such model, or making it fails.
        MissingExtraError: The library is not installed.
    """
    source, colon, rest = name.partition(":")
    if not colon or not source or not rest:
        raise GivenError(f"no model is called {name!r}\n  to fix  name it as {HOW_TO_NAME}")
    with _reworded(f"model {name}"):
        model = SOURCES[source](rest, pretrained) if source in SOURCES else _own(source, rest, pretrained)
    if not isinstance(model, nn.Module):
        raise GivenError(
            f"{name} gives a {type(model).__name__}, no torch.nn.Module\n"
            "  to fix  name a module, or a function without arguments that returns one"
        )
    return model.eval()


def _torchvision(name: str, pretrained: bool) -> Any:
    weights: dict[str, Any] = {"weights": "DEFAULT" if pretrained else None}
    models = _library("torchvision").models
    if not pretrained and "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        weights["weights_backbone"] = None  # otherwise it would be downloaded
    return models.get_model(name, **weights)


def _timm(name: str, pretrained: bool) -> Any:
    return _library("timm").create_model(name, pretrained=pretrained)


def _transformers(path: str, pretrained: bool) -> Any:
    transformers = _library("transformers")
    config = transformers.AutoConfig.from_pretrained(path)
    kind = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
    folder = Path(path)
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):  # a config alone
        return kind._from_config(config) if hasattr(kind, "_from_config") else kind.from_config(config)
    return kind.from_pretrained(path)


SOURCES: dict[str, Callable[[str, bool], Any]] = {"torchvision": _torchvision, "timm": _timm, "hf": _transformers}


def _own(module: str, name: str, pretrained: bool) -> Any:
    if pretrained:
        raise GivenError(f"--pretrained says nothing to {module}:{name}\n  to fix  load the weights in that function")
    found = imported(module, name)
    return found if isinstance(found, nn.Module) else found()


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as failure:
        raise MissingExtraError(f"{name} is not installed\n  to fix  pip install {name}") from failure


def imported(module: str, name: str) -> Any:
    """Import an object from a module, which may be in the working folder.

    Args:
        module: The name of the module.
        name: The name of the object, with dots for attributes of attributes.

    Raises:
        GivenError: There is no such module, or it has no such object.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as failure:
        if failure.name is None or not f"{module}.".startswith(f"{failure.name}."):
            raise  # a module that this one imports is missing
        raise GivenError(
            f"no module is called {module}\n"
            f"  to fix  check the spelling, or call oto where {module.replace('.', '/')}.py lies (now: {here})"
        ) from failure
    for part in name.split("."):
        if not hasattr(found, part):
            near = [n for n in vars(found) if not n.startswith("_")] if hasattr(found, "__dict__") else []
            raise GivenError(f"{module} has no {name}\n  to fix  it has {some(near) or 'nothing'}")
        found = getattr(found, part)
    return found


@contextmanager
def _reworded(what: str) -> Iterator[None]:
    """Context manager that converts failures in the user's code into one-line errors with their location."""
    try:
        yield
    except Exception as failure:
        if isinstance(failure, GivenError | MissingExtraError) or out_of_memory(failure):
            raise
        frames = traceback.extract_tb(failure.__traceback__)
        at = f"\n  at      {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        raise GivenError(f"{what} cannot be made: {first_line(failure)}{at}") from failure


def named_input(specs: Sequence[str], function: str | None = None, model: nn.Module | None = None) -> Any:
    """Make the example input that is named on a command line.

    Args:
        specs: See the table above; several are positional arguments, named ones keyword arguments.
        function: Instead, ``package.module:name`` of a function that returns the input.
        model: If neither is given, the model whose own example is used.

    Returns:
        A tensor, a tuple or a dict.

    Raises:
        GivenError: Neither is given and the model has no example, both are given, or one is invalid.
    """
    if function is not None:
        if specs:
            raise GivenError("--input and --input-fn are both given\n  to fix  give one of them")
        module, _, name = function.partition(":")
        if not name:
            raise GivenError(f"--input-fn {function}\n  to fix  name it as package.module:function")
        with _reworded(f"input {function}"):
            return imported(module, name)()
    if not specs:
        return _own_input(model)
    generator = torch.Generator().manual_seed(0)
    parts = [spec.rpartition("=") for spec in specs]
    tensors = [_tensor(shape, generator) for _, _, shape in parts]
    names = [name for name, _, _ in parts]
    if not any(names):
        return tensors[0] if len(tensors) == 1 else tuple(tensors)
    if not all(names) or len({*names}) < len(names):
        raise GivenError(
            f"--input {' --input '.join(specs)}: some have a name and some have none, or two have the same\n"
            "  to fix  name all of them, as in --input input_ids=1x128:int64 --input attention_mask=1x128:bool"
        )
    return dict(zip(names, tensors, strict=True))


def _own_input(model: nn.Module | None) -> Any:
    """An example input from attributes of the model, such as ``dummy_inputs`` of transformers.

    Raises:
        GivenError: The model has none.
    """
    held = getattr(model, "dummy_inputs", None)
    if isinstance(held, dict) and held:
        return held
    settings = getattr(model, "pretrained_cfg", None)
    if isinstance(settings, Mapping) and settings.get("input_size"):
        return torch.randn(1, *settings["input_size"], generator=torch.Generator().manual_seed(0))
    raise GivenError(
        "no input is given, and the model knows of none\n"
        "  to fix  --input 1x3x224x224, --input 1x128:int64, or --input-fn package.module:function"
    )


_SHAPE = re.compile(r"(?P<shape>\d+(?:[x×]\d+)*)(?::(?P<dtype>\w+))?(?::(?P<below>\d+))?")


def _tensor(spec: str, generator: torch.Generator) -> Tensor:
    match = _SHAPE.fullmatch(spec.strip())
    dtype = getattr(torch, match["dtype"] or "float32", None) if match else None
    if match is None or not isinstance(dtype, torch.dtype):
        raise GivenError(
            f"--input {spec} is no shape\n"
            "  to fix  such as 1x3x224x224, 1x128:int64, 1x128:int64:30522 (below 30522), input_ids=1x128:int64"
        )
    shape = [int(n) for n in re.split("[x×]", match["shape"])]
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(int(match["below"] or 2), shape, generator=generator).to(dtype)


WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that wrappers add to the names in a state dict."""


def load_weights(model: nn.Module, path: str | Path, key: str | None = None) -> None:
    """Load a checkpoint into a model.

    Args:
        path: A file of safetensors or of ``torch.save``, which is read with ``weights_only=True``; or a folder.
        key: The key of the state dict in the file; by default ``state_dict``, ``model_state_dict``, ``model``, or the
            top level.

    Raises:
        GivenError: The file cannot be read, holds no state dict, or does not fit the model.
    """
    tensors = state_dict_of(path, key)
    wanted = model.state_dict().keys()
    for wrapper in WRAPPERS:
        if not wanted & tensors.keys() and all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): t for name, t in tensors.items()}
    tensors = _in_their_memory(model, tensors)
    try:
        found = model.load_state_dict(tensors, strict=False)
    except RuntimeError as failure:
        lines = [line.strip() for line in str(failure).splitlines()[1:4]]
        raise GivenError(f"{path} does not fit {type(model).__name__}:\n  " + "\n  ".join(lines)) from failure
    # transformers and torch do not save all names of tied tensors; those that share memory with loaded ones are loaded
    missing = [n for n in found.missing_keys if n not in _tied(model, tensors)]
    if missing or found.unexpected_keys:
        what = [f"lacks {some(missing)}"] * bool(missing)
        what += [f"has {some(found.unexpected_keys)}, which the model has not"] * bool(found.unexpected_keys)
        raise GivenError(
            f"{path} does not fit {type(model).__name__}: it {' and '.join(what)}\n"
            "  to fix  name the model that it was saved from, or another part of the file: --key NAME"
        )


LARGE = 1 << 18
"""Minimum number of entries for which a parameter uses the memory of a checkpoint instead of a copy."""


def _in_their_memory(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make large parameters of the model use the memory of a checkpoint's tensors, and return the tensors to load.

    A file of safetensors is mapped into memory; with a copy of its tensors, the model would be in memory twice. The
    file is never written to.
    """
    made, done, places = dict(tensors), set[int](), set[int]()
    for name, held in model.state_dict(keep_vars=True).items():
        own = tensors.get(name)
        if own is None or type(held) is not nn.Parameter or held.numel() < LARGE:
            continue
        alike = own.shape == held.shape and own.dtype == held.dtype and own.device == held.device
        alike = alike and own.layout == held.layout == torch.strided and own.is_contiguous() and held.is_contiguous()
        if alike and id(held) not in done and own.data_ptr() not in places:  # tensors tied in the file may not be here
            done.add(id(held))
            places.add(own.data_ptr())
            held.data = own.detach()
            made[name] = held  # copying it to itself does nothing
    return made


def _tied(model: nn.Module, tensors: Mapping[str, Tensor]) -> set[str]:
    """Names of tensors that share memory with one in ``tensors``."""
    held = model.state_dict(keep_vars=True)
    there = {held[name].data_ptr() for name in tensors if name in held and held[name].numel()}
    return {name for name, tensor in held.items() if tensor.numel() and tensor.data_ptr() in there}


CHECKPOINTS = ("model.safetensors", "pytorch_model.bin", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt")
"""Names of files with weights in the folder of a checkpoint, the most specific first."""


def _file_of(path: Path) -> Path:
    """The file with the weights in the folder of a checkpoint; a path to a file is returned as it is.

    Raises:
        GivenError: There is none, or there are several candidates.
    """
    if not path.is_dir():
        return path
    for pattern in CHECKPOINTS:
        found = sorted(path.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise GivenError(
                f"{path} is a folder with several files that may hold weights: {some(file.name for file in found)}\n"
                "  to fix  name one of them; shards of one model are joined by its own library: load the model there,"
                " and torch.save(model.state_dict(), path)"
            )
    raise GivenError(f"{path} is a folder without weights\n  to fix  pass a file that torch.save or safetensors wrote")


INDEX = "model.safetensors.index.json"
"""The name of the index of a model's shards, as written by transformers and huggingface_hub."""


def _shards_in(path: Path) -> list[Path]:
    """The shards of a model in a folder, by its index; empty if there is no index.

    Raises:
        GivenError: The index cannot be read, or a file that it names is missing.
    """
    if not (path / INDEX).is_file():
        return []
    try:
        listed = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in listed.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as failure:
        raise GivenError(
            f"{path / INDEX} lists no shards: {first_line(failure)}\n"
            "  to fix  save the model again, or name one file of weights"
        ) from failure
    gone = [name for name in names if Path(name).name != name or not (path / name).is_file()]
    if gone:
        raise GivenError(
            f"{path} lacks {some(gone)}, which {INDEX} names\n  to fix  copy all files of the model into the folder"
        )
    return [path / name for name in names]


def _why(failure: Exception) -> str:
    """Why a file could not be read, in one line, without torch's advice to set ``weights_only=False``."""
    found = re.search(r"(?:GLOBAL|global:?|class:?) `?((?:\w+\.)+\w+)`?", str(failure))
    if "weights_only" not in str(failure):
        return first_line(failure)
    return f"it holds {found[1]}, which could run code" if found else "it holds more than tensors, and could run code"


def state_dict_of(path: str | Path, key: str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU; see :func:`load_weights`.

    Raises:
        GivenError: The file cannot be read safely, or holds no state dict.
    """
    if key is None and (shards := _shards_in(Path(path).expanduser())):
        return {name: tensor for file in shards for name, tensor in state_dict_of(file).items()}
    file = _file_of(Path(path).expanduser())
    if not file.is_file():
        raise GivenError(f"there is no file {file}\n  to fix  pass a file that torch.save or safetensors wrote")
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except safetensors.SafetensorError as failure:
        raise GivenError(f"{file} is no whole safetensors file: {first_line(failure)}") from failure
    except Exception as failure:  # of many kinds: pickle, zip, OS
        reraise_out_of_memory(failure)
        raise GivenError(
            f"{file} cannot be read as plain tensors: {_why(failure)}\n"
            "  effect  nothing of it was run or loaded\n"
            "  to fix  save the state dict alone: torch.save(model.state_dict(), path)"
        ) from failure
    for name in [key] if key else ["state_dict", "model_state_dict", "model"]:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
            break
    else:
        if key:
            held = [str(k) for k in found] if isinstance(found, Mapping) else []
            raise GivenError(f"{file} has nothing that is called {key}\n  to fix  it has {some(held) or 'no names'}")
    if not isinstance(found, Mapping) or not found or not all(isinstance(t, Tensor) for t in found.values()):
        held = [str(k) for k in found] if isinstance(found, Mapping) else [type(found).__name__]
        raise GivenError(f"{file} holds no state dict but {some(held)}\n  to fix  --key NAME, if it is under a name")
    return {str(name): tensor for name, tensor in found.items()}
