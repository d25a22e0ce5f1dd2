"""Batches: many requests from one file, grouped by base, with a report on each job."""
