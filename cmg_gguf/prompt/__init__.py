"""Prompts: from messages and pictures to segments."""
