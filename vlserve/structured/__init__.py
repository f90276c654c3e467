"""What an answer must look like: JSON schemas, regular expressions and the like as grammars."""
