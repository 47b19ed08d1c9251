"""Small functions that programs import from flash_attn_interface."""


def round_multiple(x: int, m: int) -> int:
    """x rounded up to a multiple of m."""
    return -(-x // m) * m
