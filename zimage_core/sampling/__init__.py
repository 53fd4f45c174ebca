"""From noise to latents: schedule, guidance, loop."""
