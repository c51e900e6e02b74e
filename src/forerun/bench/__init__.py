"""Measure variants side by side on one workload: closed loop, interleaved, paired."""
