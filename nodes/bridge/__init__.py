"""Where the pack meets ComfyUI: its folders, memory manager, models, samplers. The only files that import it."""
