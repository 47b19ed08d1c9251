"""Where programs look for rotary position embedding."""
