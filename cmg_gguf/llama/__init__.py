"""The one place that talks to llama-cpp-python and `_core`."""
