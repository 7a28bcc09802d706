"""Data: the embedded world, sources on disk and on the hub, cleaning, packing, preferences (sec 2.1, 3.2.1, A.6)."""
