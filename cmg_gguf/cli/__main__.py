"""`python -m cmg_gguf.cli`, the same as the command `cmg-gguf`."""

from cmg_gguf.cli import main

main()
