"""Tasks one after another: what is kept, what is lost, and what it costs to learn more."""
