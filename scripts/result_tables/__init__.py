"""The tables of README.md and docs/, from the files in results/."""
