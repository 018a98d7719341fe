"""One step of a solver as a pure function, and the pullback of its stages."""
