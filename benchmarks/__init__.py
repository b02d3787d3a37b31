"""Benchmarks: each prints ratios or counts taken in one run, beside the floor they are measured against."""
