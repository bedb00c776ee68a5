"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A mistake of the user's: entry points print its message as one line, without a traceback."""
