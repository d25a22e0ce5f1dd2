"""Where bytes are: texts that name them, what is read of them, and how they are written."""
