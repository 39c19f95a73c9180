"""Dose-volume figures: pure functions of a dose in Gy, boolean masks and the voxel's size."""
