"""Parameters used element by element: scales, shifts, positions, tokens."""
