"""`python -m fastdit` is the command line of `fastdit.cli`."""

from fastdit.cli import main

if __name__ == "__main__":
    main()
