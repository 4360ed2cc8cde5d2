"""The command line, `fastdit` or `python -m fastdit`: the commands and the work behind them.

It uses the library and is not used by it. `main` is the entry point; `commands.py` holds the
commands, and everything heavy is imported when one of them runs.
"""

from fastdit.cli.commands import main

__all__ = ["main"]
