"""Makes one step of a solver as a pure function, and pulls back its stages."""
