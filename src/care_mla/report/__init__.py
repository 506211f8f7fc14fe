"""A folder of results -> one page that shows them."""
