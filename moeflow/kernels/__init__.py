"""Raw tensors in, raw tensors out: the packed formats and the arithmetic on them."""
