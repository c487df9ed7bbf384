"""The engine: one answer as a session, and what decodes for it. Tokens only."""
