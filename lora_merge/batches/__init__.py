"""Many requests at a time: the batch file, groups by base, what became of each job."""
