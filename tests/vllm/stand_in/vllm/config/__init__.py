from vllm.config.compilation import CUDAGraphMode
from vllm.config.vllm import get_current_vllm_config

__all__ = ["CUDAGraphMode", "get_current_vllm_config"]
