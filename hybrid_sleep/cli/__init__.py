"""The command `hybrid-sleep`."""
