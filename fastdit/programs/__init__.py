"""Calls of the transformer as programs: recorded once for each kind of call, then run in place of its forward."""
