"""Public names that were changed. The former names still work, with a warning, until the release that removes them.

``docs/renamed.md`` has the same table for users.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

from oto.errors import OptionError, users_level

REMOVED_IN = "0.3"

OPTIONS = {"normalise": "normalize"}
"""Former names of options of optimizers, with the current ones."""

Value = TypeVar("Value")


def warn_of_former_name(former: str, now: str) -> None:
    """Warn that a former name is used."""
    warnings.warn(former_name(former, now), DeprecationWarning, stacklevel=users_level())


def former_name(former: str, now: str) -> str:
    """The text of the warning about a former name."""
    return f"{former} is called {now} now\n  effect  none; {REMOVED_IN} removes the former name\n  to fix  say {now}"


def former(name: str, value: Value, now: str) -> Value:
    """The value given under a former name, with a warning."""
    if value is not None:
        warn_of_former_name(f"{name}=", f"{now}=")
    return value


def up_to_date(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options under their current names.

    Raises:
        OptionError: An option is given under both names.
    """
    made = dict(options)
    for name in OPTIONS.keys() & options.keys():
        now, value = OPTIONS[name], made.pop(name)
        if made.get(now) is not None and value is not None:
            raise OptionError(f"{name} and {now} are the same\n  effect  nothing was made\n  to fix  say {now} alone")
        if value is not None:
            warn_of_former_name(f"{name}=", f"{now}=")
            made[now] = value
    return made
