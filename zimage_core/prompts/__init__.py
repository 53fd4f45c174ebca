"""Prompts that were encoded once."""
