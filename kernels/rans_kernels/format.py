class FormatError(ValueError):
    """A file that is damaged, truncated, or of a version this code does not read."""
