"""Files into networks: what a file is, its keys, its quantized weights."""
