"""Quantisation-aware training of language models for an entropy-coded INT8 format."""
