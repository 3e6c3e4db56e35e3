"""Facts that are written into the weights: a small world to measure it in, and the measurements."""
