"""How the parts of a block run: plain, compiled, on a CPU's rows; matmuls; the VAE in bands."""
