"""LoRA and its relatives: formulas, files."""
