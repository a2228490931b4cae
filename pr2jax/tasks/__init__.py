"""Tasks: an instruction, its ground truth, and a verifier that scores a response in [0, 1].

Modules here are imported by verifier workers: none imports JAX, and heavy libraries are imported
where they are used.
"""
