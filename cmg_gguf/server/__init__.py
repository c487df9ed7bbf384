"""The server: see `cmg_gguf.server.app`."""
