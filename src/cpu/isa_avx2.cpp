#define STROBE_ISA avx2
#include "engine.inl"
