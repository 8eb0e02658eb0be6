"""A read-only corner of the Hugging Face hub's API: tokenizer and config files of the served models.

With `HF_ENDPOINT=<server>/hf` an ordinary `AutoTokenizer.from_pretrained(NAME)` works, offline and for private models.
"""
