"""What a conversion costs in quality: perplexity, divergence, method comparisons."""
