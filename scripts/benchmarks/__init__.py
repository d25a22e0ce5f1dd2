"""What `scripts/bench.py` is made of: cases, inputs, contenders, measuring, results, tables, plot.

None of these modules imports torch or matplotlib when it is imported: a child's peak memory, as the kernel
counts it, starts at its parent's.
"""
