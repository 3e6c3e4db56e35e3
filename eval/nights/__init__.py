"""Night after night on one memory: what is kept, what drifts, what it costs."""
