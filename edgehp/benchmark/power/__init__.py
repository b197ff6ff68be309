"""Power meters, one module a kind; what they share is in `base`."""
