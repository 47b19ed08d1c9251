from enum import Enum

_OVERRIDES = {}


class AttentionBackendEnum(Enum):
    FLASH_ATTN = "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"
    CUSTOM = None

    def get_path(self, include_classname=True):
        path = _OVERRIDES.get(self, self.value)
        if not path:
            raise ValueError(f"{self.name} is not registered")
        return path if include_classname else path.rpartition(".")[0]

    def is_overridden(self):
        return self in _OVERRIDES

    def clear_override(self):
        _OVERRIDES.pop(self, None)


def register_backend(backend, class_path=None, is_mamba=False):
    assert class_path is not None and not is_mamba
    _OVERRIDES[backend] = class_path
    return lambda cls: cls
