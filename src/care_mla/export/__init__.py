"""Checkpoints that stock engines load, and the proof that they do."""
