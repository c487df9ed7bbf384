"""The engine: one answer as a session, and what decodes for it. Tokens only."""

try:
    from cmg_gguf import _core  # noqa: F401  (who needs it imports it; here it is missed first)
except ImportError as exc:
    raise ImportError(
        f"{exc}\ncmg_gguf's extension module is missing or was built for another Python. Install "
        "the package itself, `pip install .`, instead of importing its source folder."
    ) from exc
