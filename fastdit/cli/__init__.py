"""The command line, `fastdit` or `python -m fastdit`: the commands and the work behind them.

It uses the library and is not used by it. `main` is the entry point; `commands.py` holds the
commands, and everything heavy is imported when one of them runs.
"""


def main() -> None:
    """This runs the command line; without what it is made of, it says how to install that."""
    try:
        from fastdit.cli.commands import main as run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        raise SystemExit(
            f"fastdit's command line needs {error.name}; install it with: pip install 'fastdit[cli]'"
        ) from None
    run()
