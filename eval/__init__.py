"""Tasks with floors, the sleep-depth benchmark, cost benchmarks, and the demo."""
