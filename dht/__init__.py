"""Who serves what: signed records, the announcement, the directory and the stores that hold records."""
