"""Is a model healthy: what is watched while it trains and after."""
