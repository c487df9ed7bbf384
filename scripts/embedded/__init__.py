"""How the model pair that ships with cmg-gguf is made: see `train.py` for the stages."""
