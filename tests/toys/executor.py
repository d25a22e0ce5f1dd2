"""An executor: the last piece first, one after the other."""

from __future__ import annotations


def run_backwards(spec, pieces, n_workers):
    with spec.make(1) as (work,):
        for piece in reversed(pieces):
            yield work(piece)
