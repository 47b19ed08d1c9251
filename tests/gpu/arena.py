"""Every tensor of a process between guards: torch's GPU memory comes from one buffer that is full of NaN.

Bytes 0xff are NaN in every floating-point type and -1 in integers. So outputs and workspaces are poisoned before a
kernel sees them, what is read beyond a tensor shows in the result, and what is written beyond one changes a guard.
"""

import ctypes
import gc

import torch

GUARD = 64 << 10  # more than a tile of keys of the largest head dim that most cases use
ALIGN = 512  # as torch's own allocator
ALLOC = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)
FREE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p)


class _Memory:
    """Memory of the driver's, as torch.as_tensor() takes it."""

    def __init__(self, address, size):
        self.__cuda_array_interface__ = dict(shape=(size // 8,), typestr="<i8", data=(address, False), version=3)


class Arena:
    """Must be made before torch allocates any GPU memory, and lives as long as the process."""

    def __init__(self, size=4 << 30, scratch=1 << 30):
        # Before torch looks at the GPU: afterwards it keeps its own allocator.
        self.callbacks = ALLOC(self._allocate), FREE(self._free)  # as long as torch may call them
        addresses = [ctypes.cast(f, ctypes.c_void_p).value for f in self.callbacks]
        torch._C._cuda_changeCurrentAllocator(torch._C._cuda_customAllocator(*addresses))
        torch.cuda.synchronize()  # makes the context
        self.driver = ctypes.CDLL("libcuda.so.1")
        self.size, self.start = size, self._driver_memory(size)
        self.words = torch.as_tensor(_Memory(self.start, size), device="cuda")
        self.scratch = torch.as_tensor(_Memory(self._driver_memory(scratch), scratch), device="cuda")
        self.base = self.top = GUARD
        self.bodies = []  # (begin, size) since the last reset, freed ones too: no memory is handed out twice
        self.live = {}  # begin: size
        self.overflowed = False
        self.words.fill_(-1)

    def _driver_memory(self, size):
        address = ctypes.c_uint64()
        status = self.driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size))
        if status:
            raise MemoryError(f"cuMemAlloc of {size} bytes: CUDA error {status}")
        return address.value

    def _allocate(self, size, device, stream):
        begin = self.top
        if begin + size + GUARD > self.size:
            self.overflowed = True
            return self._driver_memory(size)
        self.top = (begin + size + GUARD + ALIGN - 1) // ALIGN * ALIGN
        self.bodies.append((begin, size))
        self.live[begin] = size
        return self.start + begin

    def _free(self, address, size, device, stream):
        if self.live.pop(address - self.start, None) is None:
            self.driver.cuMemFree_v2(ctypes.c_uint64(address))

    def reset(self):
        """Fills with NaN again what has been used. What still lives (a library's workspace) keeps its place."""
        torch.cuda.synchronize()
        if any(begin >= self.base for begin in self.live):
            gc.collect()
        kept = [begin + size + GUARD for begin, size in self.live.items() if begin >= self.base]
        self.base = (max([self.base, *kept]) + ALIGN - 1) // ALIGN * ALIGN
        self.words[self.base // 8 : max(self.base, self.top) // 8].fill_(-1)
        self.top, self.bodies, self.overflowed = self.base, [], False

    def check(self):
        """Raises if a byte outside of what has been allocated since the last reset changed."""
        assert not self.overflowed, "the arena is too small for this case: what did not fit has no guards"
        torch.cuda.synchronize()
        begin, end = self.base - GUARD, (self.top + 7) // 8 * 8
        bodies = list(self.bodies)
        assert end - begin <= self.scratch.numel() * 8, f"{end - begin} bytes are too many to check"
        copy = self.scratch[: (end - begin) // 8]
        copy.copy_(self.words[begin // 8 : end // 8])
        octets = copy.view(torch.uint8)
        for at, size in bodies:
            octets[at - begin : at - begin + size].fill_(255)
        changed = (copy != -1).nonzero()
        if not changed.numel():
            return
        at = begin + int(changed[0]) * 8
        near = min(bodies, key=lambda body: min(abs(at - body[0]), abs(at - body[0] - body[1])))
        raise AssertionError(
            f"{changed.numel()} words of guards were written, the first near tensor {bodies.index(near)} of "
            f"{near[1]} bytes: {at - near[0]} bytes after its begin"
        )
