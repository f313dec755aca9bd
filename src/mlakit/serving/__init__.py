"""Many requests at once on one converted model: the engine, and the server around it."""
