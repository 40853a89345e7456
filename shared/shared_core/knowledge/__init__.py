"""Teacher outputs on disk, keyed by sample content, teacher and view."""

from shared_core.knowledge.errors import KnowledgeError
from shared_core.knowledge.store import KnowledgeStore

__all__ = ["KnowledgeError", "KnowledgeStore"]
