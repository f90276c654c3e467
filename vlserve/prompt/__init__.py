"""Messages to token ids: chat messages, chat template, tokenizer."""
