"""Which files there are and what became of each: folders, archives, checks, copies, quarantine."""
