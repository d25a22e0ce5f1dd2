def dampings(values, grid, energies, rank, *, along=False):
    return 0.03
