"""The model pair that comes with the package, and the drawn world it was trained on."""
