"""Strobe in vLLM: the attention backend CUSTOM, which the entry point vllm.general_plugins registers in every process.

LLM(model, attention_backend="CUSTOM", additional_config={"strobe": {"window": 2048, "keep_first": 10}})
"""

import logging

__all__ = ["register"]
BACKEND = "strobe.vllm.backend.StrobeBackend"


def register(replace: bool = False) -> bool:
    """Makes attention_backend="CUSTOM" Strobe; whether it now is.

    The entry point calls this in every process of vLLM wherever Strobe is installed, also for those who want nothing
    of it: it imports no backend, leaves CUSTOM to another plug-in that took it, and only warns where it cannot work.

    Args:
        replace: take CUSTOM also from another plug-in.
    """
    logger = logging.getLogger("vllm.strobe")
    try:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    except ImportError as error:
        logger.warning("strobe.vllm: this vLLM has no registry of attention backends that Strobe knows: %s", error)
        return False
    custom = AttentionBackendEnum.CUSTOM
    taken = custom.get_path() if custom.is_overridden() else BACKEND
    if taken != BACKEND and not replace:
        logger.warning("strobe.vllm: CUSTOM is %s already; strobe.vllm.register(replace=True) takes it", taken)
        return False
    register_backend(custom, BACKEND)
    return True
