"""From noise to a picture in steps: the noise itself, its levels, the solvers, and their names."""
