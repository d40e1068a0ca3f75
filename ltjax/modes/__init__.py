"""What `run.py --mode=...` does, a file each."""
