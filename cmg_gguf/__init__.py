"""Cross-Modal Guidance for GGUF vision-language models."""
