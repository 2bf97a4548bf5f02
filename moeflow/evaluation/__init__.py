"""How well a packed model predicts text, and how far it lies from the unquantized one."""
