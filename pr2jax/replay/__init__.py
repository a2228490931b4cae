"""Route logs: who records them, how they are encoded and aligned, and what replay changed."""
