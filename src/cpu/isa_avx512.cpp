#define STROBE_ISA avx512
#include "engine.inl"
