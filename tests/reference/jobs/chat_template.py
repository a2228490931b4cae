"""Conversations as text and as ids, by `transformers`' apply_chat_template."""

import numpy as np
from transformers import PreTrainedTokenizerFast


def run(arrays, params):
    """For each of params["cases"] {name, folder, messages, add_generation_prompt}: NAME/text (its
    UTF-8 bytes) and NAME/ids."""
    out = {}
    for case in params["cases"]:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(case["folder"])
        settings = {"add_generation_prompt": case["add_generation_prompt"]}
        text = tokenizer.apply_chat_template(case["messages"], tokenize=False, **settings)
        ids = tokenizer.apply_chat_template(case["messages"], tokenize=True, **settings)
        ids = ids["input_ids"] if not isinstance(ids, list) else ids
        out[case["name"] + "/text"] = np.frombuffer(text.encode("utf-8"), np.uint8)
        out[case["name"] + "/ids"] = np.array(ids)
    return out
