"""Names that a user chooses and that become files, folders and log keys."""

from __future__ import annotations

import re

LONGEST = 100
"""Characters: file systems take 255 bytes, and names get numbers and endings."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def name_problem(name: str) -> str | None:
    """What keeps a name from naming a file anywhere; None where nothing does."""
    if not _NAME.fullmatch(name):
        return "use letters, digits, '_', '-' and '.' only, and begin with a letter, a digit or '_'"
    if len(name) > LONGEST:
        return f"use at most {LONGEST} characters, found {len(name)}"
    if _DEVICE.fullmatch(name):
        return "some systems keep this name for a device"
    return None
