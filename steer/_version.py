"""The version, and what a file says of its making."""

import os
from datetime import UTC, datetime

__version__ = "0.2.0"
TOOL = f"steer {__version__}"


def made_at() -> str:
    """The time now, in ISO 8601 to the second; where SOURCE_DATE_EPOCH is set, that time, so that the same inputs make
    the same bytes. Source: reproducible-builds.org."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    return (datetime.fromtimestamp(int(epoch), UTC) if epoch.isdecimal() else datetime.now(UTC)).isoformat(
        timespec="seconds"
    )
