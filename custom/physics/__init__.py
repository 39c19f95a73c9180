"""A small photon dose engine and fluence optimiser: plans synthetic patients and gives real ones their plan prior."""
