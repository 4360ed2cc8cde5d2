"""What a way of drawing is worth: pictures of the same seeds, beside each other and beside a many-step solution.

This uses the library, and the library does not use it.
"""
