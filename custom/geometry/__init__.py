"""Pure functions of masks and spacing."""
