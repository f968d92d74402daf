"""What quantizing costs, measured: medians over seeds against bounds (README.md beside this file)."""
