"""What the kernels of all ops share: checks, dispatch, chunks, tiles and launches."""
