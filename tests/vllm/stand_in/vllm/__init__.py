"""A stand-in for the part of vLLM 0.26.0 that strobe.vllm touches, where vLLM is not installed.

Files and names are where vLLM has them, so that one reader (scripts/vllm_interface.py) reads both;
test_vllm_interface.py holds every signature here against what was read from vLLM's sources.
"""

__version__ = "0.26.0"
