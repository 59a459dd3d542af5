"""Tests at HTTP level: a package, so that its endpoint is stopped when its last test has run."""
