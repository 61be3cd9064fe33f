"""The audit of anyone's training loop: its window is taped, played back and judged."""
