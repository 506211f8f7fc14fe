"""Healing: a converted model trained back towards its original."""
