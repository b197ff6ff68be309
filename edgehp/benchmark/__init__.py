"""Benchmarks: latency, throughput and energy of an artifact, and whether they may be believed."""
