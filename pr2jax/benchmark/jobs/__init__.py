"""What our side of each benchmark does in its process (`serve.py` starts it)."""
