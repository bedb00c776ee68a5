"""Text in, windows of tokens out: sources are tokenised once into a memory-mapped cache and read in a fixed order."""

from qat.data.sources import resolve
from qat.data.tokens import load_tokens
from qat.data.windows import RunSampler, spread_prompts, spread_windows, windows

__all__ = ["RunSampler", "load_tokens", "resolve", "spread_prompts", "spread_windows", "windows"]
