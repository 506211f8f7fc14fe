"""One page that shows what a folder's results say: JSON in, HTML out."""
