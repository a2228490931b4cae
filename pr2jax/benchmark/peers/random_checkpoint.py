"""Writes the random checkpoint that both sides load, with a tokenizer of one word a token."""

import os


def serve(channel, params):
    """params: `model` (configuration), `folder` (made here)."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    settings = dict(params["model"])
    vocab = settings["vocab_size"]
    # The last two ids are specials: "<pad>" and "<eos>".
    words = [f"t{i}" for i in range(vocab - 2)] + ["<pad>", "<eos>"]
    config = AutoConfig.for_model(
        settings.pop("model_type"), pad_token_id=vocab - 2, eos_token_id=vocab - 1, **settings
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(params["folder"])
    table = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(params["folder"])
    channel.loop({"files": sorted(os.listdir(params["folder"]))}, lambda message: {})
