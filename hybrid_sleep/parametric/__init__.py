"""Parametric sleep: what was learned moves into the slow weights, behind a gate."""
