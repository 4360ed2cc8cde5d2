"""One file is one backend: a module with a `BACKEND` (see base.py), found by its folder."""
