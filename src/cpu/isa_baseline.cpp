#define STROBE_ISA baseline
#include "engine.inl"
