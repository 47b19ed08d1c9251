#define STROBE_ISA avx512_bf16
#include "engine.inl"
