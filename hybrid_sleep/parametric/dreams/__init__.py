"""Dreams: what a model writes asleep, of an experience or freely, checked before it is replayed."""
