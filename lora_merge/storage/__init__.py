"""Storage: texts that name files, sources that are read, and destinations that outputs are written to."""
