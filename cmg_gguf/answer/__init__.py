"""From logits to an answer: drawing, text, stop strings."""
