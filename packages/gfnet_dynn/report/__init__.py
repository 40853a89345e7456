"""What a reader gets: lines, pages, pictures and the record. Nothing here computes a result."""
