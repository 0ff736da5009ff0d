"""Several processes at one job: who they are, and how they talk."""
