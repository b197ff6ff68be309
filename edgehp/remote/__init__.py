"""Run a command on another board over SSH: what it needs travels, its results come back."""
