"""How to compute: operators on tensors, their references in plain torch and their backends."""
