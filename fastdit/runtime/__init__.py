"""This has what lives while a model is patched, during one run, and during one call of its transformer."""
