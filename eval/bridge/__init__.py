"""Fast weights into slow weights: what is kept of a text that was slept over."""
