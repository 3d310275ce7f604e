"""Text LoRA: eight clients fine-tune LoRA on a sentence encoder to tell two kinds of sentences apart."""
