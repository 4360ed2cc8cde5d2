"""What all commands have in common: how the program is named and explained, and how a command that fails ends.

Errors that the library raises on purpose, and those of files and disks, end as one red line and exit code 2, Ctrl-C as
exit code 130.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from fastdit.errors import FastDiTError

REFUSED, INTERRUPTED = 2, 130


class Commands(TyperGroup):
    """Expected failures of these commands end without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """The command runs; see the module's description."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # typer's own business: whoever read the output has enough
        except (FastDiTError, OSError) as error:
            from fastdit.cli.console import printable

            line = printable(" ".join(str(error).split()))
            Console(stderr=True).print(Text(f"error: {line}", style="red"), soft_wrap=True)
            raise typer.Exit(REFUSED) from None
        except KeyboardInterrupt:
            Console(stderr=True).print("interrupted")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    name="fastdit",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
schedules = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    help="Look at schedule files, or convert them.",
)
app.add_typer(schedules, name="schedule")


def _version(wanted: bool) -> None:
    if wanted:
        from fastdit import __version__

        typer.echo(f"fastdit {__version__}")
        raise typer.Exit


@app.callback()
def fastdit(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Faster diffusion transformers for Hugging Face diffusers.

    [bold]Examples[/bold]

      fastdit demo

      fastdit demo "a large red circle at the left on a white background" --every 3

      fastdit demo --ralu sd3-2x --every 2

      fastdit demo "a fox in the snow" --model ./PixArt-XL-2-512x512 --steps 20

      fastdit explain --model ./FLUX.1-dev --every 2 --height 1024 --width 1024

      fastdit search --model ./PixArt-XL-2-256x256 --prompts prompts.txt --out found

      fastdit schedule show ecad.json --png ecad.png

      fastdit schedule stats ecad.json
    """
