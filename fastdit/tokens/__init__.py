"""Which tokens pass a call, and of which size."""
