"""Around the optimizer, for frameworks that own the loop; each is imported where it is used."""
