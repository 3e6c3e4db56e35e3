"""What the ops cost against their peers, both sides timed in one process."""
