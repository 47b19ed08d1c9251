#if defined(__aarch64__)
#define STROBE_ISA neon
#include "engine.inl"
#endif
