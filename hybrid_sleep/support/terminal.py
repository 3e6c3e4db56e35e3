"""Text for a terminal that may not know every character of it."""

from __future__ import annotations

import sys


def never_fail_on_characters() -> None:
    """Let standard output show a character that its encoding lacks as an escape, not an error.

    Hours of training must not end in an error because a terminal cannot show what was learned.
    Python already does so for standard error.
    """
    for stream in (sys.stdout, sys.stderr):
        # What stands in for it in a notebook or a test may have no encoding.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
