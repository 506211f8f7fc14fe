"""Reading source models tensor by tensor, and writing converted ones shard by shard."""
