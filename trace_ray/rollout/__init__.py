"""The pipeline: what a policy update does to a fleet, stage by stage, and its report."""
