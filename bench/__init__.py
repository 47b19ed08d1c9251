"""Strobe beside other attention on the same machine: `make bench`."""
