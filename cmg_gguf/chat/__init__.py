"""Chat completions in OpenAI's shape."""
