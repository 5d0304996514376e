"""Linear algebra of curvature: a problem, its Hessian, operators on it, and their extreme eigenvalues."""
