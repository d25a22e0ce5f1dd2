"""Members of no release, one file each: what `docs/extending.md` asks of a new one, and no more."""
