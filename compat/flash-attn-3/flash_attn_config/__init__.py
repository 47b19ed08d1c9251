"""What FlashAttention 3's build switches would be: FP8 alone is left out."""

_PARTS = ["BACKWARD", "SPLIT", "PAGEDKV", "APPENDKV", "LOCAL", "SOFTCAP", "PACKGQA", "FP16", "FP8", "VARLEN", "CLUSTER"]
_DIMS = ["HDIM64", "HDIM96", "HDIM128", "HDIM192", "HDIM256", "SM80", "HDIMDIFF64", "HDIMDIFF192"]

CONFIG = {"build_flags": {f"FLASHATTENTION_DISABLE_{name}": name == "FP8" for name in _PARTS + _DIMS}}


def show():
    """Prints the switches."""
    for name, value in CONFIG["build_flags"].items():
        print(f"{name}: {value}")
