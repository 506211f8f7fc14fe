"""Running sums over calibration text, one decoder layer in memory at a time."""
