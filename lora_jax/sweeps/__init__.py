"""Sweeps: a grid of members, packed into few compiled programs. See `sweep.sweep`."""
