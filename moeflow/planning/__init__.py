"""From documents to a plan: sizes, costs, choices. Imports no torch."""
