"""The networks: S3-DiT, Qwen3 encoder, autoencoder, and what they are made of."""
