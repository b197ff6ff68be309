"""Building: from a network to a checked artifact for one target."""
