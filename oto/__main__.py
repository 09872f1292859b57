"""``python -m oto`` and the console script ``oto``."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line; without its packages say what to install."""
    try:
        from oto.cli import app
    except ImportError as failure:
        if (failure.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        sys.stderr.write(
            f"the command line needs {failure.name}, which is not installed\n  to fix  pip install 'oto[cli]'\n"
        )
        return 1
    app(prog_name="oto")  # ends the process with its exit code
    return 0


if __name__ == "__main__":
    sys.exit(main())
