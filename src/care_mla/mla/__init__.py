"""The latent attention itself: factors, reference forward, our transformers class."""
