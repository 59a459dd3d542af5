"""Preference data: sources, schemas and the synthetic value-shift benchmark."""
