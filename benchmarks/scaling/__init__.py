"""What a harmonized step costs on many GPUs: a cost model, and a check of its counts."""
