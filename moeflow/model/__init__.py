"""transformers' models with moeflow's experts: built from an artifact, computed through the cache."""
