"""Importing this defines torch.ops.flash_attn_3, as importing the extension does."""

import strobe.compat.fa3_ops  # noqa: F401
