"""Which experts stay on the device: policies, oracles that know the future, and the replay of recorded routing."""
