"""What a sleeping model costs, per generated token and per sleep; ratios within one process."""
