"""Benchmarks: latency, throughput and energy of an artifact, and whether they are valid."""
