"""What `gpu_check.py` measures: a file for each kind of section, and what they share."""
