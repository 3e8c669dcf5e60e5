"""Benchmarks: Hutch beside its peers, in one run, quoted as ratios. See bench/README.md."""
