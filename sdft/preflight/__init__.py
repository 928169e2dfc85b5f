"""What a run will meet, measured before it is paid for: `python -m sdft preflight`."""
