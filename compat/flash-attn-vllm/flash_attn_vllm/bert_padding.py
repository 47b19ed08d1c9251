"""Between padded batches and packed rows."""

from strobe.compat.bert_padding import *  # noqa: F403
from strobe.compat.bert_padding import __all__ as __all__
