"""cmg-gguf judged by Hugging Face transformers, on tiny random checkpoints of real architectures.

    scripts/judge                      every family, one table
    scripts/judge --fast               three families, a few minutes
    scripts/judge llava internvl --encoder stock

A family's checkpoint is built with transformers, converted with llama.cpp's own converter, and
answered for twice: by the product, and by transformers' forward of the whole sequence under an
attention function that hides image tokens as the definition says. Both sides see the same pixels.
"""
