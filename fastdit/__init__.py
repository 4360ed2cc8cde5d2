"""Faster diffusion transformers for Hugging Face diffusers."""
