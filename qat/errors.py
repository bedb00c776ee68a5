"""The exceptions that entry points tell in one line: a user's mistake, and a check that found something."""


class UserError(ValueError):
    """A mistake of the user's: entry points print its message as one line, without a traceback."""


class CheckFailed(Exception):
    """What was checked is not as promised; entry points print its message as one line and exit with 3."""
