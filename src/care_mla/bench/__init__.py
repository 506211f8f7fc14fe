"""`care bench`: speed and memory, measured several times."""
