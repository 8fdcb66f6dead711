"""Everything that can go wrong, at random, against the whole worker; only invariants are checked. `make chaos`."""
