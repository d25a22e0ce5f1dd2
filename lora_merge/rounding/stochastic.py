def round_stochastic(values, grid, seed, key, first):
    return grid.nearest(values)
