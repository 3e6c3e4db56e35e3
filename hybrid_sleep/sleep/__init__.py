"""The mechanism: windows, passes, boundaries, and the cache that lives through them."""
