"""Long runs of the whole worker: nothing grows, nothing is lost. `make soak`."""
