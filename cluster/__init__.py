"""Serving for large language models with speculative decoding on a Ray cluster."""

__version__ = "0.1.0"
