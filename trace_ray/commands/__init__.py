"""The command groups of ``trace-ray``, a module each."""
