"""How far a quantized checkpoint is from its BF16 source: measured on tokens, with receipts."""
