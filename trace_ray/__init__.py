"""Terraform for alignment: carry a policy change through a fleet of language models."""

__version__ = "0.1.0"
