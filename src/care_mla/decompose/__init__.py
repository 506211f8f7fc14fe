"""Factorisation methods: what calibration saw in, factors of every rank out."""
