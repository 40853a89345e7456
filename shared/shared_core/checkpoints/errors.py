"""The one error that a checkpoint file can cause."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read, written, or does not fit; the message is one line."""


def first_few(names: list[str], limit: int = 3) -> str:
    """``a, b, c and 4 more``: enough of a long list for a one-line message."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
