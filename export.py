"""Compress a checkpoint: `python export.py source=<.ckpt or Hugging Face folder> output=<folder>`."""

from qat.cli import entry_point
from qat.export import export

if __name__ == "__main__":
    entry_point("export", export)
