"""What `transformers` makes of a GGUF file: logits of the model, ids and texts of the tokenizer."""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def run(arrays, params):
    """For each of params["cases"] {name, file}: logits [B, T, V] of arrays["NAME/tokens"] in fp32.

    Where the case has "texts", also NAME/ids and NAME/decoded, JSON in arrays of characters: the
    ids of each text and the text of those ids; and NAME/chat, the prompt that its chat template
    makes of the case's "messages".  NAME/own_ids and NAME/own_chat: the same of the tokenizer in
    the case's "folder".
    """
    torch.set_num_threads(2)
    out = {}
    for case in params["cases"]:
        name, file = case["name"], Path(case["file"])
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
        )
        tokens = torch.tensor(arrays[name + "/tokens"]).long()
        with torch.no_grad():
            out[name + "/logits"] = model.eval()(tokens, use_cache=False).logits.numpy()
        if "texts" not in case:
            continue
        own = AutoTokenizer.from_pretrained(case["folder"])
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        for prefix, made in (("", tokenizer), ("own_", own)):
            ids = [made(text, add_special_tokens=False)["input_ids"] for text in case["texts"]]
            chat = made.apply_chat_template(
                case["messages"], tokenize=False, add_generation_prompt=True
            )
            decoded = [made.decode(i, skip_special_tokens=True) for i in ids]
            for key, value in (("ids", ids), ("decoded", decoded), ("chat", chat)):
                out[f"{name}/{prefix}{key}"] = np.array(json.dumps(value))
    return out
