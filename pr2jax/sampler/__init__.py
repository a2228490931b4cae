"""Tokens, behaviour log-probs and routes out of a policy, in the learner's own process."""
