"""Update ⇄ bytes, in stage order: sparsify → quantize → pack → frame."""
