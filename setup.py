"""So that `pip install .` says what to do, where it would install nothing."""

raise SystemExit("nanoSDD is run in its folder, not installed: pip install -r requirements.txt")
