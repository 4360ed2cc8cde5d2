"""One file is one backend: a module with a `BACKEND` that follows `base.Backend`, found by its folder."""
