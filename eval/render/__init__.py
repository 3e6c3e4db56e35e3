"""Results in Markdown and as figures: one file a kind, from its results.json alone."""
