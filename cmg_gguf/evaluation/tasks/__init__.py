"""Benchmarks, one a file: items from files, counts from answers, figures from sums of counts."""
