"""How a step is taken: what moves is found, checked, and handed to the backends."""
