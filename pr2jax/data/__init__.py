"""Text to token batches: tokenizers, prompt rendering, packing, and resumable batch order."""
