from enum import Enum


class CUDAGraphMode(Enum):
    NONE = 0
    PIECEWISE = 1
    FULL = 2
    FULL_DECODE_ONLY = (FULL, NONE)
    FULL_AND_PIECEWISE = (FULL, PIECEWISE)

    def mixed_mode(self):
        """The mode of batches that prefill: the second of a pair."""
        return CUDAGraphMode(self.value[1]) if isinstance(self.value, tuple) else self
