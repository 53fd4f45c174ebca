"""Many images by one command: a file of prompts, a folder of images, and a journal between them."""
