"""FlashAttention's, flash-attention-SWAA's and FlexHeadFA's interfaces in Strobe's terms: what compat/ is made of."""
