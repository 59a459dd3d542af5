"""Groups of subcommands of the trace-ray command."""
