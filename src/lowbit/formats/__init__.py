"""Files that other tools write, as containers: what tensors they hold and where, checked before anything is used."""
