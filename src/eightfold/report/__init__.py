"""What is in a directory, and what this machine is."""
