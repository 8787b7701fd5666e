"""The one exception that is shown to people as a line of text instead of a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """What a user can mend: rule, value, place, and what to do.

    The command line prints its text on one line and exits with code 2. Every other exception is a defect of ours.
    """
