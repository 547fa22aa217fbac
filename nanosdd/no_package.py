"""What `pip install .` imports to build a package: it says what to do instead."""

raise SystemExit("nanoSDD is run in its folder, not installed: pip install -r requirements.txt")
