"""The one error that a knowledge store can cause."""


class KnowledgeError(ValueError):
    """Stored teacher outputs are stale, incomplete or damaged; the message is one line."""
