"""Does guidance reduce hallucination on this model and these images? Benchmarks and controls."""
