"""The version, and what a file says of its making."""

import os
from datetime import UTC, datetime

from steer.errors import InvalidInput, brief

__version__ = "0.2.0"
TOOL = f"steer {__version__}"


def made_at() -> str:
    """The time now, in ISO 8601 to the second; where SOURCE_DATE_EPOCH is set, that time, so that the same inputs make
    the same bytes. Raises InvalidInput where it is no time. Source: reproducible-builds.org."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        time = datetime.now(UTC) if epoch is None else datetime.fromtimestamp(int(epoch), UTC)
    except (ValueError, OverflowError, OSError):
        raise InvalidInput(f"SOURCE_DATE_EPOCH: {brief(epoch)} is not accepted: seconds since 1970") from None
    return time.isoformat(timespec="seconds")
