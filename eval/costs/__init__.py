"""What it costs to sleep, to decode and to train: times are measured, FLOPs are counted."""
